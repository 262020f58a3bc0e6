"Schedules against the rates that PaddleOCR 2.10 stepped through, against PyTorch's own, and what is wrong in a config"
import inspect, json, warnings
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F, yaml
from fastai.basics import SGD, Callback, DataLoader, DataLoaders, set_seed
from torch import nn

from distillbook.config import lr_schedule
from distillbook.config.values import Config, Section, line_of
from distillbook.core import UserError
from distillbook.learner import distill_learner
from distillbook.schedules import SCHEDULES, FollowSchedule
from distillbook.terms import Term

GOLDEN = np.load(Path(__file__).parent/'golden'/'lr_schedule.npz')
CASES = [k.removesuffix('|meta') for k in GOLDEN.files if k.endswith('|meta')]

# ---- PaddleOCR 2.10's own rates

@pytest.mark.parametrize('case', CASES)
def test_rates_are_paddleocrs(case):
    meta = json.loads(str(GOLDEN[f'{case}|meta']))
    f = lr_schedule(meta['lr_config'], meta['epochs'], meta['step_each_epoch'])
    got,want = [f(s) for s in GOLDEN[f'{case}|out|step'].tolist()], GOLDEN[f'{case}|out|lr']
    if case=='cosine_nowarm': np.testing.assert_allclose(got, want, rtol=1e-15)  # Paddle multiplies this one up from step to step
    else: np.testing.assert_array_equal(got, want)

def test_every_schedule_has_a_golden(): assert {json.loads(str(GOLDEN[f'{c}|meta']))['lr_config']['name'] for c in CASES} == set(SCHEDULES)

def test_a_schedule_has_no_memory():
    f = lr_schedule(dict(name='CyclicalCosine', learning_rate=.1, cycle=2, warmup_epoch=1), 8, 10)
    ahead = [f(s) for s in range(80)]
    assert [f(s) for s in reversed(range(80))] == ahead[::-1]

# ---- PyTorch's own, for what no golden has

@pytest.mark.parametrize('how', ('cos', 'linear'))
@pytest.mark.parametrize('three_phase', (False, True))
@pytest.mark.parametrize('total', (2, 7, 40, 333))
def test_one_cycle_is_pytorchs(how, three_phase, total):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    theirs = torch.optim.lr_scheduler.OneCycleLR(opt, .3, total_steps=total, anneal_strategy=how, three_phase=three_phase, cycle_momentum=False)
    f = lr_schedule(dict(name='OneCycle', max_lr=.3, anneal_strategy=how, three_phase=three_phase), 1, total)
    for s in range(total):
        np.testing.assert_allclose(f(s), theirs.get_last_lr()[0], rtol=1e-12, atol=1e-17)
        opt.step()
        if s<total-1: theirs.step()

@pytest.mark.parametrize('lr,theirs', (
    (dict(name='Step', learning_rate=.1, step_size=3, gamma=.5), partial(torch.optim.lr_scheduler.StepLR, step_size=12, gamma=.5)),
    (dict(name='MultiStepDecay', learning_rate=.1, milestones=[2,2,5], gamma=.5), partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[8,8,20], gamma=.5)),
    (dict(name='Linear', learning_rate=.1, power=2), partial(torch.optim.lr_scheduler.PolynomialLR, total_iters=40, power=2)),
    (dict(name='Cosine', learning_rate=.1), partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40))), ids=lambda o: o['name'] if isinstance(o, dict) else '')
def test_the_same_as_pytorchs(lr, theirs):
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=.1)
    theirs,f = theirs(opt),lr_schedule(lr, 10, 4)
    for s in range(40):
        np.testing.assert_allclose(f(s), theirs.get_last_lr()[0], rtol=1e-10, atol=1e-15)
        opt.step()
        theirs.step()

# ---- the warm-up

@pytest.mark.parametrize('lr,peak', ((dict(name='Const', learning_rate=.2), .2), (dict(name='Piecewise', decay_epochs=[3], values=[.5,.1]), .5), (dict(name='OneCycle', max_lr=.7), .7)))
def test_a_warm_up_is_a_line_from_zero_and_the_rest_comes_after_it(lr, peak):
    f,inner = lr_schedule(dict(lr, warmup_epoch=2), 10, 5),lr_schedule(lr, 10, 5)
    np.testing.assert_allclose([f(s) for s in range(10)], peak*np.arange(10)/10)
    assert [f(s) for s in range(10, 50)] == [inner(s) for s in range(40)]

@pytest.mark.parametrize('epochs,steps', ((.6, 2), (.625, 2), (.875, 4), (.1, 0), (0, 0), (None, 0)))
def test_a_warm_up_in_parts_of_an_epoch_is_rounded_as_python_rounds(epochs, steps):
    f = lr_schedule(dict(name='Const', learning_rate=1., warmup_epoch=epochs), 3, 4)
    assert sum(f(s)<1 for s in range(12)) == steps

def test_without_a_name_the_rate_is_constant_and_the_warm_up_overlooked():
    with pytest.warns(UserWarning, match='warmup_epoch has no effect'): f = lr_schedule(dict(learning_rate='1e-3', warmup_epoch=2), 3, 4)
    assert [f(s) for s in range(12)] == [1e-3]*12

# ---- what configs hold

def test_a_jump_to_nowhere_stays_with_the_last_value():
    f = lr_schedule(dict(name='Piecewise', decay_epochs=[700,800], values=[5e-4,5e-5], warmup_epoch=5), 1000, 2)
    assert [f(2*e) for e in (5, 704, 705, 804, 805, 999)] == [5e-4, 5e-4, 5e-5, 5e-5, 5e-5, 5e-5]

def test_numbers_as_yaml_reads_them():
    lr = yaml.safe_load('{name: Piecewise, decay_epochs: [2], values: [1e-3, 1E-4], warmup_epoch: "0.5"}')
    assert isinstance(lr['values'][0], str)
    f = lr_schedule(lr, 4, 4)
    assert (f(1), f(2), f(15)) == (5e-4, 1e-3, 1e-4)

def test_the_section_is_left_as_it_was():
    lr = dict(name='Cosine', learning_rate='1e-3', warmup_epoch=1)
    lr_schedule(lr, 4, 4)
    assert lr == dict(name='Cosine', learning_rate='1e-3', warmup_epoch=1)

def test_what_paddleocrs_trainer_overwrites_is_passed_over_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        f = lr_schedule(dict(name='Linear', learning_rate=1., epochs=100, step_each_epoch=7, last_epoch=-1), 2, 4)
    assert f(4) == .5

@pytest.mark.parametrize('lr,message', (
    (dict(name='Cosin', learning_rate=.1), "Optimizer.lr.name: no schedule 'Cosin'; did you mean 'Cosine'"),
    (dict(name='cosine', learning_rate=.1), "did you mean 'Cosine'"),
    (dict(name=['Cosine'], learning_rate=.1), r"Optimizer.lr.name: no schedule \['Cosine'\]"),
    (dict(name=None, learning_rate=.1), 'Optimizer.lr.name: no schedule None'),
    (dict(name='Cosine', learning_rat=.1), "Optimizer.lr.learning_rat: no key 'learning_rat'; did you mean 'learning_rate'"),
    (dict(name='Cosine', learning_rate=.1, warmup_epochs=1), "Optimizer.lr.warmup_epochs: no key 'warmup_epochs'; did you mean 'warmup_epoch'"),
    (dict(name='Cosine'), 'Optimizer.lr: cosine needs learning_rate'),
    (dict(name='Step', learning_rate=.1), 'Optimizer.lr: step_decay needs step_size and gamma'),
    (dict(name='Cosine', learning_rate='fast'), "Optimizer.lr.learning_rate: a number is wanted, not 'fast'"),
    *((dict(rest, learning_rate=rate), f'Optimizer.lr.learning_rate: a number.* is wanted, not {said}') for rest in (dict(name='Cosine'), dict(name='Const', warmup_epoch=1), {})
      for rate,said in ((-.1,'-0.1'), ('-.1','-0.1'), (None,'None'), (True,'True'), (False,'False'), ('nan','nan'), (float('nan'),'nan'), ('inf','inf'), ('1e30',r'1e\+30'), ([.1],r'\[0.1\]'), ('',"''"))),
    (dict(name='OneCycle', max_lr=-1), 'Optimizer.lr.max_lr: a number from 0 is wanted, not -1'),
    (dict(name='Linear', learning_rate=.1, end_lr=None), 'Optimizer.lr.end_lr: a number is wanted, not None'),
    (dict(name='Linear', learning_rate=.1, power='-2'), 'Optimizer.lr.power: a number from 0 is wanted, not -2'),
    (dict(name='Cosine', learning_rate=.1, warmup_epoch='long'), "Optimizer.lr.warmup_epoch: a number from 0 is wanted, not 'long'"),
    (dict(name='Cosine', learning_rate=.1, warmup_epoch=-1), 'Optimizer.lr.warmup_epoch: a number from 0 is wanted, not -1'),
    (dict(name='Piecewise', decay_epochs=7, values=[.1,.2]), 'Optimizer.lr.decay_epochs: a list is wanted, not 7'),
    (dict(name='Piecewise', decay_epochs='12', values=[.1,.2]), "Optimizer.lr.decay_epochs: a list is wanted, not '12'"),
    (dict(name='Piecewise', decay_epochs=[7], values=[]), r'Optimizer.lr.values: a list of numbers is wanted, not \[\]'),
    *((dict(name='Piecewise', decay_epochs=[7], values=[.1,v]), f'Optimizer.lr.values.1: a number from 0 is wanted, not {said}') for v,said in (('x',"'x'"), (None,'None'), (True,'True'), (-1,'-1'), ('nan','nan'))),
    (dict(name='Piecewise', decay_epochs=['x'], values=[.1,.2]), "Optimizer.lr.decay_epochs.0: a number from 0 is wanted, not 'x'"),
    (dict(name='Piecewise', decay_epochs=[7], values=[.1,.2,.3]), 'Optimizer.lr.values: 3 values need 2 decay_epochs, there are 1'),
    (dict(name='Piecewise', decay_epochs=[7,5], values=[.1,.2,.3]), r'Optimizer.lr.decay_epochs: the epochs must rise, not \[7.0, 5.0\]'),
    (dict(name='MultiStepDecay', learning_rate=.1, milestones=[3,1], gamma=.1), r'Optimizer.lr.milestones: the epochs must rise, not \[3.0, 1.0\]'),
    (dict(name='CyclicalCosine', learning_rate=.1, cycle=0), 'Optimizer.lr.cycle: 0 epochs are less than a step'),
    (dict(name='Step', learning_rate=.1, step_size=.01, gamma=.1), 'Optimizer.lr.step_size: 0.01 epochs are less than a step'),
    (dict(name='OneCycle', max_lr=.1, anneal_strategy='cosine'), "Optimizer.lr.anneal_strategy: no anneal_strategy 'cosine'; did you mean 'cos'"),
    (dict(name='OneCycle', max_lr=.1, three_phase='yes'), "Optimizer.lr.three_phase: true or false is wanted, not 'yes'"),
    (.001, 'Optimizer.lr: a section such as {name: ...} is wanted, not 0.001'),
    (None, 'Optimizer.lr: a section such as {name: ...} is wanted, not None')))
def test_what_is_wrong_is_said(lr, message):
    with pytest.raises(UserError, match=message): lr_schedule(lr, 10, 4)

def test_a_section_of_a_file_does_as_a_dict_does_and_knows_its_line():
    text = 'Optimizer:\n  lr:\n    name: Piecewise\n    decay_epochs: [2]\n    values: [1e-3, small]\n'
    cfg = Config(yaml.safe_load(text))
    cfg.path,cfg.lines = 'a.yml',line_of(text)
    with pytest.raises(UserError, match="^a.yml:5: Optimizer.lr.values.1: a number from 0 is wanted, not 'small'$"): lr_schedule(Section(cfg, 'Optimizer', 'lr'), 4, 4)
    cfg['Optimizer']['lr']['values'][1] = 1e-4
    assert [lr_schedule(Section(cfg, 'Optimizer', 'lr'), 4, 4)(s) for s in range(16)] == [1e-3]*8+[1e-4]*8

@pytest.mark.parametrize('epochs,steps', ((0, 4), (4, 0)))
def test_a_run_without_steps_has_no_schedule(epochs, steps):
    with pytest.raises(UserError, match='at least one of each'): lr_schedule(dict(name='Const', learning_rate=1), epochs, steps)

def test_a_key_of_another_schedule_is_warned_of():
    with pytest.warns(UserWarning, match='Optimizer.lr.decay_epochs has no effect'): lr_schedule(dict(name='Cosine', learning_rate=.1, decay_epochs=[7]), 10, 4)

@pytest.mark.parametrize('good', ('1e-3', 1e-3, np.float32(.001), '0.001', 0))
def test_number(good):
    for lr in (dict(name='Const', learning_rate=good), dict(learning_rate=good), dict(name='Piecewise', decay_epochs=[1], values=[good])):
        assert (rate := lr_schedule(lr, 1, 1)(0)) == float(good) and type(rate) is float

def halved(step, epochs, per_epoch, learning_rate, jumps=()): return learning_rate/2**sum(step>=e*per_epoch for e in jumps)
WRONG = [*((dict(learning_rate=v), f'learning_rate: a number.* is wanted, not {v!r}') for v in (-1, 'x', True, None)), (dict(learning_rate=.1, jumps=[1,'x']), "jumps.1: a number from 0 is wanted, not 'x'"), (dict(learning_rat=.1), "learning_rat: no key 'learning_rat'; did you mean 'learning_rate'")]

def test_a_schedule_of_ones_own(monkeypatch):
    monkeypatch.setattr('distillbook.config.registry.TRUSTED', {__name__})
    f = lr_schedule(dict(name=f'{__name__}.halved', learning_rate='1e-3', jumps=['1',2]), 4, 4)
    assert [f(s) for s in (0, 4, 8, 15)] == [1e-3, 5e-4, 2.5e-4, 2.5e-4]
    for own,message in WRONG:
        with pytest.raises(UserError, match='^Optimizer.lr.'+message): lr_schedule(dict(own, name=f'{__name__}.halved'), 4, 4)
    with pytest.raises(UserError, match=f"Optimizer.lr.name: no class or function in {__name__} 'halve'; did you mean 'halved'"): lr_schedule(dict(name=f'{__name__}.halve', learning_rate=.1), 4, 4)

def test_schedules_are_told_only_what_the_table_of_settings_knows():
    for f in SCHEDULES.values(): assert list(inspect.signature(f).parameters)[:3] == ['step','epochs','per_epoch']

# ---- in a learner

def learner(cbs=(), **kw):
    set_seed(0)
    items = [(x, int(x.sum()>0)) for x in torch.randn(24, 4)]
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items, bs=12))
    return distill_learner(dls, dict(A=nn.Linear(4,2), B=nn.Linear(4,2)), [Term(F.cross_entropy, n) for n in 'AB'], cbs=cbs, **kw)

def fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)
    return learn

SCHEDULE = lr_schedule(dict(name='Cosine', learning_rate=.1, warmup_epoch=1), 4, 6)

class Watch(Callback):
    "Keeps the parameters after each step"
    def before_fit(self): self.seen = []
    def after_step(self): self.seen.append([p.detach().clone() for p in self.learn.model.parameters()])

def test_the_callback_sets_every_step_and_nothing_in_validation():
    learn = fit(learner(FollowSchedule(SCHEDULE)), 4)
    assert learn.recorder.lrs == [SCHEDULE(s) for s in range(24)]

def test_the_first_step_of_a_warm_up_moves_no_weight():
    learn = learner([FollowSchedule(SCHEDULE), watch := Watch()], opt_func=SGD)
    before = [p.detach().clone() for p in learn.model.parameters()]
    fit(learn, 1)
    assert [all(torch.equal(a, b) for a,b in zip(before, seen)) for seen in watch.seen] == [True] + [False]*5

def test_a_fit_that_goes_on_meets_the_rates_that_it_would_have_had():
    whole,halves = fit(learner(FollowSchedule(SCHEDULE)), 4),learner(FollowSchedule(SCHEDULE))
    fit(fit(halves, 2), 4, start_epoch=2)
    assert all(torch.equal(a, b) for a,b in zip(whole.model.parameters(), halves.model.parameters()))

def test_networks_keep_their_factors():
    learn = fit(learner(FollowSchedule(lambda step: .5, B=.1)), 1)
    assert {n: h['lr'] for (n,*_),h in zip(learn.groups, learn.opt.hypers)} == {'A': .5, 'B': .05}
    with pytest.raises(UserError, match="no trainable net 'C'"): fit(learner(FollowSchedule(SCHEDULE, C=.1)), 1)

def test_fastais_own_schedules_have_the_word():
    with_ours,without = learner(FollowSchedule(SCHEDULE)),learner()
    for learn in (with_ours, without):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    assert with_ours.recorder.lrs == without.recorder.lrs

def test_the_learning_rate_finder_is_not_disturbed():
    learn = learner(FollowSchedule(SCHEDULE))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False, suggest_funcs=())
    lrs = np.array([float(o) for o in learn.recorder.lrs])
    assert (np.diff(lrs)>0).all() and lrs[0]<1e-6
