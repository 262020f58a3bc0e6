"A configuration file: how values are read, what a name stands for, what is said of mistakes, what is written"
import copy, os, pickle
from pathlib import Path
import pytest, torch, yaml
from torch import nn
from distillbook.config import load_config, save_config
from distillbook.config.files import find_config, shipped_configs
from distillbook.config.registry import *
from distillbook.config.values import *
from distillbook.core import UserError

CONFIGS = Path(__file__).parents[1]/'configs'
SMALL = 'Global: {epoch_num: 2, save_model_dir: run}\nArchitecture: {Models: {Student: {Backbone: {name: PlainBackbone}, Head: {name: CTCHead}}}}\n'

def write(tmp_path, text, name='my.yml'):
    (tmp_path/name).write_text(text)
    return tmp_path/name

def said(f):
    "The one line of the `UserError` that `f` ends in"
    with pytest.raises(UserError) as e: f()
    assert '\n' not in str(e.value) and len(str(e.value))<1100
    return str(e.value)


# %% values
@pytest.mark.parametrize('value,kind,want', [(3, int, 3), (3, float, 3), (2.5, float, 2.5), ('1e-3', float, .001), ('1.0e+3', float, 1000.), (True, bool, True), ('a', str, 'a'), ([1], list, [1]), ((1,2), list, (1,2)), ({'a': 1}, dict, {'a': 1})])
def test_values_of_their_kind(value, kind, want):
    got = as_kind(value, kind)
    assert got==want and type(got)==type(want)

@pytest.mark.parametrize('value,kind,least,says', [(True, int, None, 'a whole number'), (1.5, int, None, 'a whole number'), ('3', int, None, 'a whole number'), (0, int, 1, 'a whole number from 1'), (-1, float, 0, 'a number from 0'), (True, float, None, 'a number'), ('fast', float, None, 'a number'),
    (float('nan'), float, None, 'a number'), (float('inf'), float, None, 'a number'), ('nan', float, None, 'a number'), (10**30, int, None, 'a whole number'), (1, bool, None, 'true or false'), ('true', bool, None, 'true or false'), (None, str, None, 'text'), (5, str, None, 'text'), ('a', list, None, 'a list'), ([1], dict, None, 'a section')])
def test_values_of_another_kind(value, kind, least, says): assert says+' is wanted, not ' in said(lambda: as_kind(value, kind, least))

def test_line_of():
    assert line_of('a: 1\nb:\n  c: 2\n  d:\n  - e: 1\n  - f: 2') == {('a',): 1, ('b',): 2, ('b','c'): 3, ('b','d'): 4, ('b','d','0','e'): 5, ('b','d','1','f'): 6}
    assert line_of('a: &x {b: 1}\nc: *x')[('c','b')]==1

@pytest.mark.parametrize('word', ['on','off','yes','no','On','NO','y','n'])
def test_words_that_yaml_takes_for_truth_stay_keys(word):
    assert parsed(f'{word}: 1', 'x')[0]=={word: 1}
    assert parsed(f'a: [{{{word}: [b]}}]', 'x')[0]=={'a': [{word: ['b']}]}

def test_truth_stays_truth_as_a_value():
    assert parsed('a: on\nb: no\nc: true\nd: "on"', 'x')[0]==dict(a=True, b=False, c=True, d='on')
    assert parsed('true: 1', 'x')[0]=={True: 1}

def test_too_much():
    bomb = 'a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n' + ''.join(f"{b}: &{b} [{', '.join([f'*{a}']*10)}]\n" for a,b in zip('abcdefg', 'bcdefgh'))
    assert 'more than' in said(lambda: parsed(bomb, 'x')) and 'within one another' in said(lambda: parsed('['*300+']'*300, 'x'))
    assert 'zero character' in said(lambda: parsed('a: "b\\0c"', 'x'))
    assert count_values(yaml.compose('a: [1, 2, {b: 3}]'))==8

def test_a_configuration_knows_its_file(tmp_path):
    cfg = load_config(write(tmp_path, SMALL), ['Global.seed=3'])
    assert cfg.path==str(tmp_path/'my.yml') and cfg.lines[('Architecture','Models')]==2
    for other in (Config(cfg), cfg.copy_with(Eval={}), copy.deepcopy(cfg), copy.copy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert isinstance(other, Config) and other.path==cfg.path and other.lines==cfg.lines and other['Global']['seed']==3
    assert cfg.copy_with(Eval={})['Eval']=={} and 'Eval' not in cfg
    assert place_of(cfg, 'Architecture', 'Models', 'Student', 'x')==f"{tmp_path/'my.yml'}:2: Architecture.Models.Student.x"
    assert place_of(dict(cfg), 'Global')=='Global' and place_of({})=='' and Config(dict(a=1)).path==''

@pytest.fixture
def section():
    cfg = Config(dict(A=dict(n=3, x='1e-2', t='word', yes=True, names=['a','b'], one='a', none=None, inner=dict(k=1), odd=[1])))
    cfg.path,cfg.lines = 'f.yml',{('A',): 1, ('A','n'): 2, ('A','inner'): 7, ('A','inner','k'): 8}
    return Section(cfg, 'A')

def test_a_section_reads(section):
    s = section
    assert (s.read('n', int), s.read('x', float), s.read('t', str), s.read('yes', bool), s.read('none', int, 5), s.read('not_there', int, None))==(3, .01, 'word', True, 5, None)
    assert s.names('names')==['a','b'] and s.names('one')==['a'] and s.names('none', [])==[] and s.choice('t', ['word','other'])=='word' and s.choice('not_there', [1,2], 2)==2
    assert s.section('inner').read('k', int)==1 and s.maybe('inner').path==('A','inner') and s.maybe('not_there','deeper').values=={} and s.maybe('none').values=={}
    assert 'n' in s and 'm' not in s and s.get('m', 9)==9 and s.place('n')=='f.yml:2: A.n' and s.place('inner','k')=='f.yml:8: A.inner.k' and s.place('t')=='f.yml:1: A.t'
    assert s.only(['n','x','t','yes','names','one','none','inner'], ['odd'])==['A.odd']

@pytest.mark.parametrize('f,says', [(lambda s: s.read('n', str), 'f.yml:2: A.n: text is wanted, not 3'), (lambda s: s.read('n', int, least=4), 'f.yml:2: A.n: a whole number from 4'), (lambda s: s.read('m', int), 'f.yml:1: A.m: a whole number is wanted, not None'),
    (lambda s: s.choice('t', ['words'], kind='thing'), "f.yml:1: A.t: no thing 'word'; did you mean 'words'?"), (lambda s: s.names('odd'), 'A.odd: a list of names'), (lambda s: s.section('n'), 'A: a section n is wanted'), (lambda s: s.maybe('n'), "A.n: names and values are wanted, not 3"),
    (lambda s: s.section('inner').only(['kk']), "f.yml:8: A.inner.k: no key 'k'; did you mean 'kk'?")])
def test_a_section_refuses(section, f, says): assert said(lambda: f(section)).startswith(says) or says in said(lambda: f(section))

def test_blame_names_the_innermost_place_once(section):
    def inner():
        with section.blame():
            with section.blame('n'): raise UserError('wrong')
    assert said(inner)=='f.yml:2: A.n: wrong'


# %% names
class Part(nn.Module):
    def __init__(self, in_channels:int, width:int=8, rate:float=.1, name_of:str='a', sizes:list=None, flag:bool=False, more=None): super().__init__()

def free(a, *rest, b=1, **anything): return a,b,anything
def strict(a:int, /, b:int=1): return b

def spot(**values): return Section(Config(dict(P=values)), 'P')

def test_parameters():
    assert list(parameters(Part))==['in_channels','width','rate','name_of','sizes','flag','more'] and list(parameters(free))==['a','b'] and list(parameters(strict))==['b']
    assert takes_anything(free) and not takes_anything(Part) and parameters(dict)=={}

def test_arguments():
    assert arguments(Part, spot(name='x', width=4, rate='1e-2'), in_channels=3)==dict(in_channels=3, width=4, rate=.01)
    assert arguments(Part, spot(sizes=None, more=None), in_channels=3)==dict(sizes=None, more=None, in_channels=3)
    assert arguments(free, spot(a=1, c=2))==dict(a=1, c=2) and arguments(Part, spot(old=1), ignored=('old',), in_channels=3, never=4)==dict(in_channels=3)

@pytest.mark.parametrize('values,given,says', [(dict(widht=4), dict(in_channels=3), "P.widht: no key of Part 'widht'; did you mean 'width'?"), (dict(width='wide'), dict(in_channels=3), "P.width: a whole number is wanted, not 'wide'"), (dict(width=None), dict(in_channels=3), 'P.width: a whole number'),
    (dict(flag=1), dict(in_channels=3), 'P.flag: true or false'), (dict(sizes='a'), dict(in_channels=3), 'P.sizes: a list'), (dict(width=4), {}, 'P: Part needs in_channels'), (dict(in_channels=5), dict(in_channels=3), "P.in_channels: no key of Part 'in_channels'"), ({1: 2}, dict(in_channels=3), 'P.1: no key of Part 1')])
def test_wrong_arguments(values, given, says): assert said(lambda: arguments(Part, spot(**{}) if not values else Section(Config(dict(P=values)), 'P'), **given)).startswith(says)

def test_build():
    assert isinstance(build(Part, spot(name='Part'), in_channels=2), Part)
    def choosy(n:int):
        if n<0: raise UserError('n: it may not be negative')
        return [10][n]
    assert build(choosy, spot(n=0))==10
    assert said(lambda: build(choosy, spot(n=-1)))=='P: n: it may not be negative'
    assert said(lambda: build(choosy, spot(n=4)))=="P: choosy cannot be made of {'n': 4}: list index out of range"
    def broken(n): raise NameError('a slip of the author')
    with pytest.raises(NameError): build(broken, spot(n=1))

def test_find():
    kinds = Registry('widget', nn.Module, Linear=nn.Linear)
    assert kinds.find('Linear', spot())==nn.Linear and kinds.find('torch.nn.Conv2d', spot())==nn.Conv2d
    assert 'P.name: no widget \'Linaer\'; did you mean \'Linear\'?' in said(lambda: kinds.find('Linaer', spot(), 'name'))
    assert 'P.name: nowhere.Linear is code outside of distillbook' in said(lambda: kinds.find('nowhere.Linear', spot(), 'name'))
    assert "P.name: no class or function in torch.nn 'Linaer'; did you mean 'Linear'" in said(lambda: kinds.find('torch.nn.Linaer', spot(), 'name'))
    assert 'P.name: torch.nn.functional.relu is no class made from torch.nn' in said(lambda: kinds.find('torch.nn.functional.relu', spot(), 'name'))
    assert "no thing 'os.sep': os is a module of Python's own" in said(lambda: Registry('thing').find('os.sep', spot(), 'name'))
    assert 'P.name' in said(lambda: kinds.find('..', spot(), 'name'))
    for odd in (None, 5, [], '', '.', 'a..b', '..', '.a', 'a.', 'os.', {}): assert 'P.name' in said(lambda: kinds.find(odd, spot(), 'name'))

@pytest.mark.parametrize('text,says', [('x = (', 'SyntaxError'), ('1/0', 'ZeroDivisionError: division by zero'), ('import not_a_module_at_all', "No module named 'not_a_module_at_all'")])
def test_modules_that_cannot_be_imported(tmp_path, monkeypatch, text, says):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/'own_but_broken.py').write_text(text)
    monkeypatch.setattr('distillbook.config.registry.TRUSTED', {'own_but_broken'})
    m = said(lambda: Registry('thing').find('own_but_broken.Thing', spot(), 'name'))
    assert m.startswith("P.name: no thing 'own_but_broken.Thing'") and says in m

def test_every_entry_can_be_called_by_its_signature():
    "No entry has keys that cannot be named, and none is a copy of another under one name in two tables"
    tables = [*BACKBONES.values(), ENCODERS, *NECKS.values(), *HEADS.values(), LOSSES, DECODERS, METRICS, OPERATIONS, DATASETS, OPTIMISERS, SCHEDULES, WEIGHTS]
    for table in tables:
        assert table.kind and all(callable(v) for v in table.values())
        for name,entry in table.items(): assert not any(p.kind is p.POSITIONAL_ONLY for p in __import__('inspect').signature(entry).parameters.values()), name
    assert {'kd','dml','dkd','dist','distance','cosine','attention_transfer','ctc_loss','ctc_dkd','db_loss','dila_db'}<=set(LOSSES)


# %% files
def test_shipped_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name,file in (('quickstart','quickstart.yml'), ('rec/ppocrv3','rec/ppocrv3.yml'), ('det/ppocrv3_cml','det/ppocrv3_cml.yml')):
        assert find_config(name)==shipped_configs()/file and load_config(name).path==str(shipped_configs()/file)
    assert "no configuration 'quikstart'; did you mean 'quickstart'?" in said(lambda: load_config('quikstart'))
    write(tmp_path, SMALL, 'quickstart')
    assert load_config('quickstart')['Global']['save_model_dir']=='run' # A file here goes before

@pytest.mark.parametrize('path', sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob('*.yml')))
def test_shipped_configurations_are_right(path): assert load_config(CONFIGS/path)

@pytest.mark.parametrize('path', ['quickstart.yml','rec/ppocrv3_distillation.yml','det/ppocrv3_cml.yml'])
def test_a_saved_configuration_is_the_same(tmp_path, path):
    cfg = load_config(CONFIGS/path, ['Global.seed=3', 'Global.save_model_dir=äöü/☃', 'Global.print_batch_step=7'])
    save_config(cfg, tmp_path/'out.yml')
    assert load_config(tmp_path/'out.yml')==cfg and cfg['Global']['save_model_dir']=='äöü/☃' and '&' not in (tmp_path/'out.yml').read_text()

def test_configurations_share_nothing(tmp_path):
    a,b = (load_config(CONFIGS/'quickstart.yml') for _ in range(2))
    a['WithoutTeacher']['Architecture']['Models']['Student']['Backbone']['channels'].append(1)
    a['Eval']['watched']['dataset']['transforms'].clear()
    assert a['Architecture']['Models']['Student']==b['Architecture']['Models']['Student'] and a['WithoutTeacher']['Architecture']['Models']['Student2']==b['WithoutTeacher']['Architecture']['Models']['Student2']
    assert a['Train']['dataset']['transforms']==b['Train']['dataset']['transforms'] and a['Eval']['held_out']==b['Eval']['held_out']

@pytest.mark.parametrize('text,says', [
    ('Global:\n  epochs_num: 3', ":2: Global.epochs_num: no key 'epochs_num'; did you mean 'epoch_num'?"),
    ('Architecture: {}\n\nGlobl: {}', ":3: Globl: no key 'Globl'; did you mean 'Global'?"),
    ('Train:\n  loader:\n    batch_size: 4', ":3: Train.loader.batch_size: no key 'batch_size'; did you mean 'batch_size_per_card'?"),
    ('Global:\n  seed: 1.5', ':2: Global.seed: a whole number from 0 is wanted, not 1.5'),
    ('Global:\n  seed: true', ':2: Global.seed: a whole number'),
    ('Global:\n  seed: -1', ':2: Global.seed: a whole number from 0'),
    ('Global:\n  epoch_num: 0', ':2: Global.epoch_num: a whole number from 1'),
    ('Global:\n  save_model_dir: [a]', ':2: Global.save_model_dir: text is wanted'),
    ('Architecture:\n  Models: []', ':2: Architecture.Models: networks with names'),
    ('Architecture:\n  Models:\n    Student: {Backbon: 1}', ":3: Architecture.Models.Student.Backbon: no key 'Backbon'; did you mean 'Backbone'?"),
    ('Architecture:\n  model_type: dett', ":2: Architecture.model_type: no model_type 'dett'; did you mean 'det'?"),
    ('Eval:\n  near: {dataset: {}}\n  far: {datset: {}}', ":3: Eval.far.datset: no key 'datset'; did you mean 'dataset'?"),
    ('Metric: {key: Studnt}', "Metric.key: no net 'Studnt'; did you mean 'Student'?"),
    ('PostProcess:\n  model_name: [Student, Techer]', ":2: PostProcess.model_name: no net 'Techer'"),
    ('Loss:\n  name: CombinedLoss\n  loss_config_list:\n  - Term: {loss: kd, on: [Student]}\n  - Trem: {}', ":5: Loss.loss_config_list.1.Trem: no loss 'Trem'; did you mean 'Term'?"),
    ('Loss:\n  name: CombinedLoss\n  loss_config_list: []', ':3: Loss.loss_config_list: a list of losses'),
    ('Global: 5', 'Global: names and values are wanted, not 5'),
    ('- a\n- b', 'top level: a section is wanted'),
    ('42', 'top level: a section is wanted'),
    ('1: 2', '1: no key 1;'),
    ('Architectur: {}', ":1: Architectur: no key 'Architectur'; did you mean 'Architecture'?"),
    ('? [a, b]\n: 1', 'not YAML'),
    ('Global: {seed: 1', ': not YAML'),
    ('Global: !!python/object/apply:os.system [echo]', 'not YAML'),
    ('Global: &a [*a]', 'an anchor holds itself'),
])
def test_mistakes(tmp_path, text, says):
    both = 'Architecture: {Models: {Student: {pretrained: PP-OCRv3_rec, freeze_params: true}}}\n'
    text = text if 'Architecture' in text or text[0] not in 'GTEMPL' else text+'\n'+both
    m = said(lambda: load_config(write(tmp_path, text)))
    assert says in m and 'my.yml' in m, m

@pytest.mark.parametrize('o,says', [('Global.sed=1', "did you mean 'seed'"), ('Global', 'looks like Global.seed=1'), ('=1', "no key ''"), ('Global.seed=[', 'not YAML'), ('Global.seed=a', 'a whole number'), ('Global.epoch_num.x=1', "no key 'x'"), ('Global=1', 'names and values are wanted'), ('Global.a.b=1', "no key 'a'"),
    ('Architecture.Models.Studnt.freeze_params=true', "did you mean 'Student'"), ('Architecture.Models.Student.Backbone.name.x=1', "'x'"), ('Global.seed=!!python/x', 'not YAML'), ('Global.seed=&a [*a]', 'an anchor holds itself'), ('Loss=&a {x: *a}', 'an anchor holds itself')])
def test_wrong_overrides(tmp_path, o, says): assert says in said(lambda: load_config(write(tmp_path, SMALL), [o]))

def test_overrides(tmp_path):
    cfg = load_config(write(tmp_path, SMALL), ['Global.save_res_path=a=b.txt', 'Global={seed: 0}', 'Architecture.Models.Student.Backbone={name: PlainBackbone, channels: [1, 2, 3, 4]}', 'Architecture.Models.Student.Backbone.channels.2=9', 'Global.print_batch_step='])
    assert cfg['Global']==dict(epoch_num=2, save_model_dir='run', save_res_path='a=b.txt', seed=0, print_batch_step=None)
    assert cfg['Architecture']['Models']['Student']['Backbone']['channels']==[1,2,9,4]

def test_files(tmp_path):
    with pytest.raises(UserError, match='none.yml cannot be read: No such file'): load_config(tmp_path/'none.yml')
    (tmp_path/'d.yml').mkdir()
    with pytest.raises(UserError, match='cannot be read'): load_config(tmp_path/'d.yml')
    (tmp_path/'b.yml').write_bytes(b'\xff\xfe\x00\x01')
    with pytest.raises(UserError, match='not text|not YAML'): load_config(tmp_path/'b.yml')
    with pytest.raises(UserError, match='Architecture'): load_config(write(tmp_path, ''))

def test_what_changes_nothing_is_said(tmp_path, caplog):
    with caplog.at_level('INFO', 'distillbook'): load_config(write(tmp_path, SMALL+'Train: {loader: {use_shared_memory: true}}\nprofiler_options: 1'), ['Global.debug=true'])
    assert [r.getMessage().partition('here: ')[2] for r in caplog.records]==['profiler_options, Global.debug, Train.loader.use_shared_memory']

@pytest.mark.parametrize('names,says', [("''", 'letters, digits'), ('a/b', 'letters, digits'), ('..', 'letters, digits'), ('"a b"', 'letters, digits')])
def test_names_of_evaluation_sets_become_names_of_files(tmp_path, names, says):
    from distillbook.config.data import eval_sides
    cfg = load_config(write(tmp_path, SMALL+f'Eval: {{{names}: {{dataset: {{}}, loader: {{}}}}}}'))
    assert says in said(lambda: eval_sides(cfg))
