"Every command and every path of the library on a GPU: on a pretended one where there is none (pretend_gpu.py), on the real one with `pytest --device cuda`. Then mistakes, made on purpose, which must not pass; and a GPU whose memory does not suffice, or which is not there"
import copy, functools, json, logging, warnings
import numpy as np, pytest, torch, torch.nn.functional as F, yaml
from fastai.basics import Callback, DataLoader, DataLoaders, accuracy, set_seed
from torch import distributed as dist, nn
from benchmarks.methods import __main__ as which, cifar
from distillbook import cache, core
from distillbook.backbones import PPLCNetV3
from distillbook.cache import CachedNet
from distillbook.checkpoint import load_file
from distillbook.config import load_config
from distillbook.config.assembly import run_settings
from distillbook.det import boxes
from distillbook.det.render import write_pages
from distillbook.learner import distill_learner
from distillbook.losses import distance, kd
from distillbook.nets import Nets
from distillbook.rec import sar
from distillbook.rec.labels import Alphabet, NRTRClasses
from distillbook.rec.nrtr import NRTRHead
from distillbook.reparam import RepLayer, calibrate, fuse
from distillbook.terms import Term
from distillbook.det.nets import plain_det
from distillbook.use.export import export_onnx
from distillbook.use import evaluation, teachers, training
from distillbook.use.finetune import remap_classes
from distillbook.use.released import TEACHERS
from distillbook.use.report import lr_find, summary
from distillbook.use.teachers import FunctionNet, OnnxNet, OwnInput, load_teacher
from distillbook.use.training import Experiment, Run, device_for, train
from small_nets import small_rec
from test_cli import fails, inside as distillbook, tiny_run
from test_cli_io import NETS, ROOT, overrides
from test_v4_rec import as_published, words
from test_v5_nets import FINDERS, READERS

DET,REC = ROOT/'configs/det/plain_cml.yml',ROOT/'configs/rec/ppocrv3_distillation.yml'
ONE_DEVICE,NO_NUMPY = 'on the same device|same device as the indexed',"convert cuda:0 device type tensor to numpy"

@pytest.fixture(scope='module', autouse=True)
def machine(gpu): return gpu

def ok(*args):
    "A command that succeeds"
    r = distillbook(*args)
    assert r.returncode==0, r.stderr
    return r

def device_in(run): return json.loads((run/'summary.json').read_text())['machine']['device']

# ---- what a GPU does, and the pretended one too

def test_tensors_of_two_places_are_not_mixed():
    x,y = torch.ones(3),torch.ones(3, device='cuda')
    for mix in (lambda: x+y, lambda: torch.cat([x,y]), lambda: F.mse_loss(x, y), lambda: torch.stack([torch.ones(()), y[0]]), lambda: x[y.long()], lambda: nn.Linear(3,3).cuda()(x), lambda: nn.Linear(3,3)(y), lambda: torch.equal(x, y),
        lambda: y.index_put_((y.long(),), x), lambda: F.embedding(torch.zeros(2, dtype=torch.long), torch.ones(3,3).cuda())):
        with pytest.raises(RuntimeError, match='device'): mix()
    with pytest.raises(RuntimeError): nn.LSTM(3,3).cuda()(torch.ones(2,1,3))
    for no in (y.numpy, lambda: np.asarray(y), lambda: np.mean([y])):
        with pytest.raises(TypeError, match=NO_NUMPY): no()
    assert (y+torch.tensor(1.)).tolist()==[2.,2.,2.] and y[torch.tensor([0,1])].shape==(2,) and float(y.sum())==3 and x.copy_(y).device.type=='cpu'
    y[0] = torch.tensor(5.)
    assert y.cpu().numpy().tolist()==[5.,1.,1.] and y.device==torch.zeros_like(y).device==torch.device('cuda', 0) and y.is_cuda and not x.is_cuda
    assert x.to(y).is_cuda and x.to('cuda', torch.float16).dtype==torch.float16 and not y.cpu().is_cuda and y.to('cuda:0') is y and torch.tensor([1], device='cuda').is_cuda and copy.deepcopy(y).is_cuda

def test_whole_operations_have_their_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Flatten(2))
    rnn,x,y = nn.LSTM(12,6,2,bidirectional=True),torch.randn(2,3,6,5),torch.randint(1,12,(2,2))
    def grads(device):
        for m in (net, rnn): m.to(device).zero_grad()
        out = rnn(net(x.to(device)).transpose(0,1))[0]
        out = F.scaled_dot_product_attention(out, out, out)
        F.ctc_loss(out.log_softmax(-1), y.to(device), torch.tensor([4,4]), torch.tensor([2,2])).backward()
        return [p.grad.cpu() for m in (net, rnn) for p in m.parameters()]
    for a,b in zip(grads('cpu'), grads('cuda')): assert a.device==b.device and torch.allclose(a, b, atol=1e-5)
    assert {p.device.type for p in net.parameters()}=={'cuda'} and all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert net.cpu()(x).device.type=='cpu' and type(net[0].weight) is nn.Parameter

# ---- the commands

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu')
    ok('render', 'rec', '-o', folder/'words', '-n', 16, '--val', 8)
    write_pages(folder/'pages', 4, 5, height=96, width=128)
    return folder

@pytest.fixture(scope='module')
def rec(folder):
    "A run of two recognisers with CTC and SAR heads, two steps"
    return folder/'rec',ok('train', '-c', REC, '-o', *NETS, *overrides(folder, f'Global.save_model_dir={folder}/rec', 'Global.cal_metric_during_train=true', 'Global.print_batch_step=1'))

def test_train(rec, gpu):
    run,r = rec
    assert f'steps an epoch, on {gpu}, float32, ' in r.stderr and r.stderr.count(gpu)==1 and 'thread' in r.stderr and device_in(run)==gpu
    assert {'config.yml','train.log','metrics.csv','summary.json','curves.png','pictures_eval.png','latest.pth','best_accuracy.pth'}<={p.name for p in run.iterdir()}
    assert all(v.device.type=='cpu' for v in load_file(run/'best_accuracy.pth')['model'].values())

def test_precisions_and_resume(rec, folder, gpu):
    for amp in ('bf16','fp16'):
        r = ok('train', '-c', rec[0]/'config.yml', '--amp', amp, '-o', f'Global.save_model_dir={folder}/amp')
        assert f'on {gpu}, {amp}, ' in r.stderr
    r = ok('train', '-c', folder/'amp/config.yml', '-o', 'Global.epoch_num=2', f'Global.checkpoints={folder}/amp/latest')
    assert 'epoch: [2/2]' in r.stderr and 'epoch: [1/2]' not in r.stderr

def test_the_other_commands(rec, folder, tmp_path):
    run,words = rec[0],folder/'words/images'
    assert {'acc','Teacher_acc'}<=set(json.loads(ok('eval', '--run', run, '--json').stdout))
    assert len(json.loads(ok('predict', '--run', run, '--json', words/'000000.png', words/'000001.png').stdout))==2
    ok('export', '--run', run, '--net', 'Student', '--out', tmp_path)
    ok('export', '--run', run, '--net', 'all', '--ensemble', 'weights', '--out', tmp_path)
    ok('extract', run, '-o', tmp_path/'s.pdparams')
    assert (tmp_path/'Student.onnx').exists() and (tmp_path/'Ensemble.onnx').exists() and (tmp_path/'s.pdparams').exists()
    ok('summary', '--run', run, '--draw', tmp_path/'s.png')
    assert set(json.loads(ok('lr-find', '-c', run/'config.yml', '--steps', 10, '--json').stdout))=={'valley','steep','minimum'}
    ok('compare', run, run, '--draw', tmp_path/'c.png')

def test_read(folder):
    assert json.loads(ok('read', folder/'pages/images/00000.png', '--json').stdout)

def test_another_alphabet(rec, folder, tmp_path):
    for name,chars in (('old','0123456789abcdefghijklmnopqrstuvwxyz'), ('new','0123456789abcdefghijklmnopqrstuvwxyzABC')): (tmp_path/f'{name}.txt').write_text('\n'.join(chars))
    more = f'Global.character_dict_path={tmp_path}/new.txt', f'Global.pretrained_dict_path={tmp_path}/old.txt', 'Global.use_space_char=false', f'Global.pretrained_model={rec[0]}/latest.pth', f'Global.save_model_dir={tmp_path}/run'
    assert '36 were known' in ok('train', '-c', rec[0]/'config.yml', '-o', *more).stderr
    for begin in ('random','mean'):
        net = remap_classes(small_rec(Alphabet('abc')).cuda(), Alphabet('abc'), Alphabet('bcd'), begin)
        assert {t.device.type for t in net.state_dict().values()}=={'cuda'}

def test_another_alphabet_for_nrtr():
    old,new = Alphabet('abc'),Alphabet('bcd')
    net = nn.ModuleDict(dict(ctc=nn.Linear(8, len(old)), nrtr=NRTRHead(8, len(NRTRClasses(old.chars)), nrtr_dim=32, num_decoder_layers=1))).cuda()
    for begin in ('random','mean'): assert {t.device.type for t in remap_classes(net, old, new, begin).state_dict().values()}=={'cuda'}

def test_ppocrv4(words, tmp_path, gpu):
    "NRTR beside CTC, layers of branches, SVTR as a teacher: trained, measured, used and exported"
    path = as_published(words, tmp_path)
    ok('train', '-c', path, '-o', 'Global.use_gpu=true', 'Global.checkpoints=', 'Architecture.Models.Teacher.pretrained=none')
    assert device_in(tmp_path)==gpu
    assert 'acc' in json.loads(ok('eval', '--run', tmp_path, '--json').stdout)
    assert len(json.loads(ok('predict', '--run', tmp_path, '--json', words/'0.png').stdout))==1
    ok('export', '--run', tmp_path, '--net', 'Student', '--out', tmp_path/'out')

def test_batches_of_several_heights(words, tmp_path, gpu):
    sides = [f'{s}.dataset.{o}' for s in ('Train','Eval') for o in (f'data_dir={words}', f'label_file_list=[{words}/lines.txt]')]
    head = [f'Architecture.Head.head_list.{o}' for o in ('0.CTCHead.Neck.dims=8', '0.CTCHead.Neck.depth=1', '0.CTCHead.Neck.hidden_dims=16', '1.NRTRHead.nrtr_dim=32', '1.NRTRHead.num_decoder_layers=1')]
    small = ['Architecture.Backbone.scale=0.0625', 'Global.pretrained_model=', 'Global.character_dict_path=', 'Global.use_space_char=false', 'Global.epoch_num=1',
        'Train.sampler.scales=[[64,32],[64,48]]', 'Train.sampler.first_bs=4', 'Train.loader.batch_size_per_card=4', 'Eval.loader.batch_size_per_card=4', 'Train.loader.num_workers=0', 'Eval.loader.num_workers=0']
    ok('train', '-c', 'rec/ppocrv4', '-o', *small, *head, *sides, f'Global.save_model_dir={tmp_path}/run')
    assert device_in(tmp_path/'run')==gpu

def test_branches_and_their_fusing():
    torch.manual_seed(0)
    net,x = PPLCNetV3(scale=.0625).cuda(),torch.randn(4,3,48,32, device='cuda')
    layer = next(m for m in net.modules() if isinstance(m, RepLayer))
    kernel = sum(k for k,_ in layer.eval().kernels()).detach()
    layer.spread(kernel, sum(b for _,b in layer.kernels()).detach())
    want = calibrate(net, x).eval()(x)
    got = fuse(copy.deepcopy(net))(x)
    assert got.is_cuda and (got-want).abs().max().item()<1e-4*want.abs().max().item()

@pytest.mark.parametrize('make', [*READERS.values(), *FINDERS.values()], ids=[*(f'{k}-lines' for k in READERS), *(f'{k}-pages' for k in FINDERS)])
def test_later_backbones(make):
    "A step, and the answer of what was fused"
    torch.manual_seed(0)
    net,x = make().cuda(),torch.randn(4,3,64,64, device='cuda')
    y = net(x)
    sum(m.square().mean() for m in (y if isinstance(y, list) else [y])).backward()
    assert {p.grad.device.type for p in net.parameters() if p.grad is not None}=={'cuda'}
    first = lambda net: (y if not isinstance(y := net(x), list) else y[-1]).detach()
    want,got = first(net.eval()),first(fuse(net))
    assert got.is_cuda and (got-want).abs().max().item()<=1e-4*want.abs().max().item()

UNUSED = {f'backbone.blocks{s}.0.dw_conv.act.lab.{k}' for s in (3,4,5,6) for k in ('scale','bias')} # Behind a stride of 2 there is no activation, in PaddleOCR either

@pytest.mark.parametrize('name', [k for k,t in TEACHERS.items() if t.trains])
def test_every_released_network_of_the_table_learns_on_it(name):
    "The answer is that of the CPU, and every weight gets a gradient, the backbone of a reader without its guide too"
    torch.manual_seed(0)
    net = load_teacher(name)
    net = net[0] if isinstance(net, tuple) else net
    x = torch.randn(2,3,*(48,96) if TEACHERS[name].task=='rec' else (64,64))
    def answer(): return y['maps'] if isinstance(y := net(x), dict) else y.softmax(-1)
    with torch.no_grad(): want = answer()
    net,x = net.cuda(),x.cuda()
    with torch.no_grad(): got = answer()
    assert got.is_cuda and (got.cpu()-want).abs().max().item()<1e-2 # TF32
    net.train()
    answer().square().mean().backward()
    assert {k for k,p in net.named_parameters() if p.grad is None} == (UNUSED if 'v4_det' in name or 'v5_det' in name or 'seal' in name else set())
    assert all(p.grad.is_cuda and p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

def test_quickstart(tmp_path, monkeypatch, gpu):
    "The README's command: the teacher is asked where the networks are, and no thread is left idle"
    asked,rows = [],CachedNet._rows
    def look(self, keys, x, kwargs):
        asked.append((x.device.type, next(self.net.parameters()).device.type))
        return rows(self, keys, x, kwargs)
    monkeypatch.setattr(CachedNet, '_rows', look)
    args = [a for a in tiny_run(tmp_path/'run') if 'threads' not in a]
    r = ok(*args, 'Global.epoch_num=1', 'Train.dataset.words=32')
    assert set(asked)=={('cuda','cuda')} and f'on {gpu}, float32, {torch.get_num_threads()} thread' in r.stderr
    assert 'threads' not in load_config('quickstart')['Global']

def test_features_of_a_released_teacher(tmp_path):
    "PP-OCRv4's backbone, not only its answers; what is compared is made alike by a convolution that learns"
    feature = 'Loss.loss_config_list.1={Term: {loss: distance, on: [Student.backbone, Teacher.net.net.backbone], weight: 1.0}}'
    r = ok(*tiny_run(tmp_path/'run', 'Global.epoch_num=1', 'Train.dataset.words=16', 'Architecture.Models.Teacher.pretrained=PP-OCRv4_rec', 'Architecture.Models.Teacher.cache=false', feature))
    assert device_in(tmp_path/'run')!='cpu' and 'distance_Student_Teacher: ' in r.stderr

def test_five_minutes(tmp_path, gpu):
    "What tools/on_a_gpu.sh trains, in small"
    small = ['Architecture.Models.Student.Backbone.scale=0.0625', 'Train.dataset.words=8', 'Train.loader.batch_size_per_card=4', 'Train.loader.num_workers=0', 'Eval.watched.dataset.words=4', 'Eval.unseen_font.dataset.words=4', 'Global.epoch_num=1']
    r = ok('train', '-c', ROOT/'benchmarks/five_minutes.yml', '-o', *small, f'Global.save_model_dir={tmp_path}/run')
    assert f'on {gpu}, bf16, ' in r.stderr
    ok('compare', tmp_path/'run', '--draw', tmp_path/'curve.png')

def det_args(folder, run, *more):
    at = lambda side, op: next(i for i,o in enumerate(load_config(DET)[side]['dataset']['transforms']) if op in o)
    small = [f'Architecture.Models.{n}.{o}' for n in ('Student','Student2') for o in ('Backbone.channels=[8,8,8,8]','Neck.out_channels=8')]
    data = [f'{s}.{o}' for s in ('Train','Eval') for o in (f'dataset.data_dir={folder}/pages', f'dataset.label_file_list=[{folder}/pages/label.txt]', 'loader.num_workers=0', 'loader.batch_size_per_card=2')]
    sizes = f'Train.dataset.transforms.{at("Train","EastRandomCropData")}.EastRandomCropData.size=[64, 64]', f'Eval.dataset.transforms.{at("Eval","DetResizeForTest")}.DetResizeForTest={{limit_side_len: 96, limit_type: max}}'
    return ['train', '-c', DET, '-o', *small, *data, *sizes, f'Global.save_model_dir={folder}/{run}', 'Global.epoch_num=1', 'Global.print_batch_step=1', *more]

@pytest.fixture(scope='module')
def cml(folder):
    "A run of two detectors and a frozen one"
    ok(*det_args(folder, 'cml', 'Architecture.Models.Teacher.pretrained=none', 'Architecture.Models.Teacher.Neck.out_channels=8'))
    return folder/'cml'

def test_detectors(cml, folder, gpu):
    assert device_in(cml)==gpu and (cml/'pictures_eval.png').exists()
    assert 'epoch: [2/2]' in ok('train', '-c', cml/'config.yml', '-o', 'Global.epoch_num=2', f'Global.checkpoints={cml}/latest').stderr
    assert 'hmean' in json.loads(ok('eval', '--run', cml, '--json').stdout)
    assert len(json.loads(ok('predict', '--run', cml, '--json', folder/'pages/images/00001.png', '-o', 'PostProcess.box_thresh=0.0').stdout))==1
    ok('export', '--run', cml, '--net', 'Student', '--out', folder/'det')

def test_a_teacher_of_onnxruntime(folder, caplog):
    "It is asked on the CPU, and that is said once"
    core.say_once.cache_clear()
    export_onnx(plain_det(), folder/'plain.onnx', 'det', shape=(3,None,None)) # No network of the table, so onnxruntime has to run it
    cfg = yaml.safe_load(DET.read_text())
    cfg['Architecture']['Models']['Teacher'] = dict(pretrained=str(folder/'plain.onnx'), freeze_params=True)
    (folder/'onnx.yml').write_text(yaml.safe_dump(cfg))
    args = det_args(folder, 'onnx', 'Train.loader.num_workers=2')
    args[2] = folder/'onnx.yml'
    r = ok(*args)
    if 'CUDAExecutionProvider' not in __import__('onnxruntime').get_available_providers(): assert r.stderr.count('is asked on the CPU, while the networks are on the GPU')==1 and 'pip install onnxruntime-gpu' in r.stderr

def test_onnxruntime_with_a_gpu(monkeypatch):
    "Then it computes there; where it falls back to the CPU, that is said"
    import onnxruntime as ort
    asked,start,works = [],ort.InferenceSession,True
    class Session:
        def __init__(self, path, opts, providers):
            asked.append(providers)
            self.real = start(path, opts, providers=['CPUExecutionProvider'])
        def get_providers(self): return [asked[-1][0][0] if works and isinstance(asked[-1][0], tuple) else 'CPUExecutionProvider']
        def __getattr__(self, name): return getattr(self.real, name)
    monkeypatch.setattr(ort, 'InferenceSession', Session)
    monkeypatch.setattr(ort, 'get_available_providers', lambda: ['CUDAExecutionProvider','CPUExecutionProvider'])
    said = []
    monkeypatch.setattr(teachers, 'say_once', lambda line, level: said.append(line))
    net,x = OnnxNet('PP-OCRv3_rec'),torch.zeros(1,3,48,64)
    assert asked==[['CPUExecutionProvider']] and net(x).device.type=='cpu' and len(asked)==1
    y = net(x.cuda())
    assert y.is_cuda and asked[1][0][0]=='CUDAExecutionProvider' and asked[1][0][1]['device_id']==0 and not said
    net(x.cuda())
    assert len(asked)==2
    works = False
    OnnxNet('PP-OCRv3_rec')(x.cuda())
    assert 'PP-OCRv3' in said[0] and 'onnxruntime-gpu' in said[0] or 'asked on the CPU' in said[0]

# ---- in Python

def small(h): return nn.Sequential(nn.Conv2d(1,h,3), nn.BatchNorm2d(h), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(.1), nn.Linear(9*h,5))

def items(n=20):
    rng = torch.Generator().manual_seed(0)
    return list(zip(torch.randn(n,1,8,8,generator=rng), torch.randint(5, (n,), generator=rng)))

TERMS = [Term(F.cross_entropy, 'Student'), Term(kd, 'Student', 'Teacher'), Term(distance, 'Student.2', 'Teacher.2')]
def small_learner(device='cuda', **kw):
    "Two networks, with a tap and a projector"
    set_seed(0)
    dls = DataLoaders(DataLoader(items(), bs=8, shuffle=True), DataLoader(items(), bs=8), device=device)
    return distill_learner(dls, dict(Teacher=small(8), Student=small(4)), TERMS, frozen=['Teacher'], metrics=accuracy, **kw)

@pytest.mark.parametrize('where', ['batches','one network','nowhere'])
def test_loaders_without_a_device(where):
    "Loaders that know no device: all is on the GPU before the first batch, as fastai has it in a fit"
    class Batches:
        n_inp = 1
        def __len__(self): return 2
        def __iter__(self):
            for b in torch.utils.data.DataLoader(items(16), batch_size=8): yield [o.cuda() for o in b] if where=='batches' else b
    nets = dict(Teacher=small(8), Student=small(4))
    if where=='one network': nets['Teacher'].cuda()
    learn = distill_learner(DataLoaders(Batches(), Batches()), nets, TERMS, frozen=['Teacher'], metrics=accuracy)
    assert {p.device.type for p in learn.model.parameters()}=={'cuda'}
    quiet_fit(learn, 1)
    assert {p.device.type for p in learn.model.parameters()}=={'cuda'} and len(learn.parts())==2
    assert summary(learn)['terms']

@pytest.mark.parametrize('on', ['cpu','cuda'])
def test_loaders_whose_device_is_none(on):
    "fastai's, made without one, go where the networks are, as in fastai; so do those that only some networks have left"
    dls = DataLoaders(DataLoader(items(16), bs=8), DataLoader(items(16), bs=8))
    assert dls.device is None
    learn = distill_learner(dls, dict(Teacher=small(8), Student=small(4).to(on)), TERMS, frozen=['Teacher'], metrics=accuracy)
    for _ in range(2):
        assert {p.device.type for p in learn.model.parameters()}=={on}
        quiet_fit(learn, 1)
    assert len(learn.parts())==2

def quiet_fit(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)

def test_a_learner():
    learn = small_learner(monitor='Student_accuracy')
    quiet_fit(learn, 2, 1e-2)
    assert {p.device.type for p in learn.model.parameters()}=={'cuda'} and '_projectors' in learn.model._modules
    assert len(learn.parts())==6 and len(learn.table())==2 and learn.plot_terms() is not None
    with learn.no_bar(), learn.no_logging():
        x,preds,y = learn.get_preds(with_input=True)
        assert len(learn.validate())==3
        assert learn.show_results() is not None
    assert x.device.type==y.device.type==preds['Student'].device.type=='cpu' and torch.equal(y, torch.stack([o[1] for o in items()]))
    learn.unfreeze('Teacher')
    quiet_fit(learn, 1, learn.lr_by_net(Student=1e-3))
    learn.freeze('Student')
    quiet_fit(learn, 1)
    assert lr_find(learn, 10).rates and summary(learn)['terms']
    assert {p.device.type for p in copy.deepcopy(learn.model).parameters()}=={'cuda'}

class Fails(Callback):
    "An error in the middle of a batch"
    def after_pred(self): 1/0

@pytest.mark.parametrize('amp', ['to_bf16', 'to_fp16'])
def test_precisions_follow_the_networks(amp):
    "Not the machine: a run on the CPU has nothing of the GPU's"
    learn = getattr(small_learner(), amp)()
    assert learn.mixed_precision.amp_mode.value==amp[3:]
    quiet_fit(learn, 1)
    with pytest.raises(ZeroDivisionError): quiet_fit(learn, 1, cbs=Fails())
    assert not torch.is_autocast_enabled('cuda') and not torch.is_autocast_enabled('cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = getattr(small_learner('cpu'), amp)()
    assert not hasattr(learn, 'mixed_precision')
    quiet_fit(learn, 1)
    assert learn.parts().notna().all(axis=None)

def by_hand(folder, loader=DataLoader, **run):
    set_seed(0)
    size = dict(bs=8) if loader is DataLoader else dict(batch_size=8)
    dls = DataLoaders(loader(items(), **size), loader(items(8), **size))
    return Experiment(Nets(dict(Teacher=small(8), Student=small(4)), ['Teacher']), TERMS, dls, run=Run(folder, **run))

@pytest.mark.parametrize('loader', [DataLoader, torch.utils.data.DataLoader])
def test_an_experiment(tmp_path, loader, gpu):
    "With fastai's loaders and PyTorch's; fastai's Adam goes on; afterwards one can look at it"
    learn = train(by_hand(tmp_path, loader, epochs=1))
    exp = by_hand(tmp_path, loader, epochs=2, resume=tmp_path/'latest.pth')
    learn = train(exp)
    assert learn.summary['machine']['device']==gpu and exp.nets['Student'][0].weight.is_cuda and len(learn.parts())==6
    assert summary(exp)['nets'][1]['MACs']>0

def test_odd_teachers(tmp_path):
    x = torch.randn(4,1,8,8).cuda()
    for net in (FunctionNet(lambda a: a.mean((1,2,3), keepdims=True)), CachedNet(small(3).eval().cuda(), tmp_path/'a.bin').eval(), OwnInput(nn.Conv2d(3,2,1)).cuda().eval()):
        y = net(x.expand(-1,3,-1,-1) if isinstance(net, OwnInput) else x)
        assert y.is_cuda and y.isfinite().all()

def test_ranks(tmp_path):
    "One rank's part of what several do: its share of the data, DDP around the networks, counts added up"
    devices = pytest.importorskip('distillbook.devices')
    dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())
    try:
        learn = small_learner()
        class OneCard:
            def prepare_model(self, nets): return nn.parallel.DistributedDataParallel(nets)
        quiet_fit(learn.to_distributed(accelerator=OneCard()), 1)
        assert {p.device.type for p in learn.model.parameters()}=={'cuda'} and len(learn.parts())==3
        assert [len(devices.part_of(learn.dls.train, r, 2, True)) for r in (0, 1)]==[2,2]
        assert all(b[0].is_cuda for b in devices.part_of(learn.dls.train, 0, 2, True))
    finally: dist.destroy_process_group()

def test_every_method_on_a_tiny_cifar(tmp_path, monkeypatch):
    "`--full --data --device cuda` in the time that it is given: teachers, students, losses with a memory and measures, all there"
    for k,v in dict(WIDTHS=(2,4,4,8), DEPTHS=dict(teacher=14, student=8), BS=8, MOST=1, where=dict(cifar.where)).items(): monkeypatch.setattr(cifar, k, v)
    monkeypatch.setattr(which.Table.step_times, '__defaults__', (1,))
    cifar.make_cifar(tmp_path, 24, 8, classes=4)
    for f in (cifar.pictures, cifar.teacher): f.cache_clear()
    which.main(['--full', '--data', str(tmp_path), '--device', 'cuda', '--minutes', '60', '--seeds', '0', '--out', str(tmp_path/'out')])
    got = json.loads((tmp_path/'out'/'methods_cifar.json').read_text())
    assert set(got['runs']['1']['0'])=={'Alone','label_smoothing',*cifar.METHODS} and cifar.teacher('Teacher').head[2].weight.is_cuda
    for f in (cifar.pictures, cifar.teacher): f.cache_clear()

# ---- mistakes, made on purpose

def left_behind(fn):
    "A function whose result stays on the CPU"
    def on_cpu(*args, **kw):
        res = fn(*args, **kw)
        return {k: v.cpu() for k,v in res.items()} if isinstance(res, dict) else res.cpu()
    return on_cpu

def mistaken(message):
    "What stands in an error, or in what it came from"
    return pytest.raises(Exception, match=message)

def test_a_batch_left_behind(rec, monkeypatch):
    monkeypatch.setattr(evaluation, 'device_of', lambda model: torch.device('cpu'))
    r = distillbook('eval', '--run', rec[0])
    assert r.returncode==2 and 'device' in r.stderr

def test_numbers_looked_at_on_the_gpu(cml, monkeypatch):
    monkeypatch.setattr(boxes, 'as_array', lambda o: o.detach().float().numpy())
    r = distillbook('eval', '--run', cml)
    assert r.returncode==2 and 'to numpy' in r.stderr

def test_an_answer_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'joined', left_behind(cache.joined))
    teacher = CachedNet(small(8).cuda().eval(), tmp_path/'a.bin').eval()
    dls = DataLoaders(DataLoader(items(), bs=8), DataLoader(items(), bs=8), device='cuda')
    with mistaken(ONE_DEVICE): distill_learner(dls, dict(Teacher=teacher, Student=small(4)), TERMS[:2], frozen=['Teacher'])

def test_a_mask_left_behind(monkeypatch):
    net,x = small_rec(Alphabet('abc')).cuda().head.sar_head,torch.randn(2,32,1,8).cuda()
    x = torch.randn(2, net.decoder.conv3x3_1.in_channels, 1, 8).cuda()
    net.read(x)
    monkeypatch.setattr(sar, 'valid_columns', left_behind(sar.valid_columns))
    with mistaken(ONE_DEVICE): net.read(x)

def test_a_projector_left_behind(monkeypatch):
    add = Nets.add_projector
    def elsewhere(self, *args):
        add(self, *args)
        self.to = lambda device: self
    monkeypatch.setattr(Nets, 'add_projector', elsewhere)
    with mistaken(ONE_DEVICE): small_learner()

def test_a_state_left_behind(tmp_path, monkeypatch):
    "The averages of fastai's Adam, on the way back from a file"
    from distillbook import checkpoint
    train(by_hand(tmp_path, epochs=1))
    monkeypatch.setattr(checkpoint, 'to_device', lambda o, device: o)
    with mistaken(ONE_DEVICE): train(by_hand(tmp_path, epochs=2, resume=tmp_path/'latest.pth'))

def test_a_loss_that_makes_its_own_tensors():
    def smooth(logits, y): return (logits-torch.ones(logits.shape)).pow(2).mean()
    with mistaken('smooth.*fails on a batch.*on the same device'): distill_learner(DataLoaders(DataLoader(items(), bs=8), DataLoader(items(), bs=8), device='cuda'), dict(Student=small(4)), [Term(smooth, 'Student')])

# ---- too little memory, and no GPU

FULL = 'CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.20 GiB is free.\nOf the allocated memory ...'

@pytest.mark.parametrize('when', ['at once', 'later', 'in an evaluation', 'in eval'])
def test_out_of_memory(when, rec, folder, tmp_path, monkeypatch):
    "One line, with the size of a batch and what to try"
    from distillbook.rec.nets import RecModel
    forward,calls = RecModel.forward,[]
    @functools.wraps(forward)
    def full(self, x, *args, **kw):
        calls.append(self.training and torch.is_grad_enabled())
        if dict(zip(('at once','later','in an evaluation','in eval'), (True, sum(calls)>2, not calls[-1] and sum(calls)>3, True)))[when]: raise torch.OutOfMemoryError(FULL)
        return forward(self, x, *args, **kw)
    monkeypatch.setattr(RecModel, 'forward', full)
    if when=='in eval': r = distillbook('eval', '--run', rec[0])
    else: r = distillbook('train', '-c', rec[0]/'config.yml', '-o', f'Global.save_model_dir={tmp_path}/run')
    side,more = ('Eval','') if 'eval' in when else ('Train',', or --amp bf16')
    fails(r, f"the GPU's memory is not enough for batches of 8 (PyTorch tried to allocate 20.00 GiB): try {side}.loader.batch_size_per_card=4{more}", after_log=True)
    assert r.stderr.strip().endswith(f'=4{more}')

def test_no_gpu(rec, tmp_path, monkeypatch):
    "Whoever asks for one is told, once, and gets the CPU; whoever does not is told nothing"
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    core.say_once.cache_clear()
    r = ok('train', '-c', rec[0]/'config.yml', '-o', f'Global.save_model_dir={tmp_path}/run', 'Global.use_gpu=true')
    assert r.stderr.count('Global.use_gpu')==r.stderr.count('everything is computed on the CPU')==1 and ', on cpu, float32, ' in r.stderr and device_in(tmp_path/'run')=='cpu'
    said = []
    monkeypatch.setattr(training, 'say_once', lambda line, level: said.append(line))
    for wanted,n in ((None, 0), ('cpu', 0), ('cuda', 1), ('cuda:1', 2)): assert device_for(Run(device=wanted))==torch.device('cpu') and len(said)==n
    for wanted,device in (('true','cuda'), ('false','cpu'), ('',None)): assert run_settings(load_config(rec[0]/'config.yml', [f'Global.use_gpu={wanted}'])).device==device

def test_the_cpu_beside_a_gpu(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'distillbook'): learn = train(by_hand(tmp_path, epochs=1, device='cpu'))
    assert ', on cpu, float32, ' in caplog.text and device_in(tmp_path)=='cpu' and {p.device.type for p in learn.model.parameters()}=={'cpu'}
