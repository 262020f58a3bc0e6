"A released reader on a few lines, the case of labels, classes re-mapped character by character, and a threshold branch grown again"
import copy, logging, pickle
import pytest, torch
from torch import nn
from distillbook.core import UserError
from distillbook.det.nets import ppocrv3_det
from distillbook.det.render import write_pages
from distillbook.checkpoint import load_file
from distillbook.config import load_config
from distillbook.config.assembly import experiment
from distillbook.layers import FixedBatchNorm2d, conv_bn, keep_statistics
from distillbook.nets import Nets
from distillbook.rec.worn import WEAR, write_worn_lines
from distillbook.use.finetune import Between, case_as_read, case_differs, new_threshold, remap_classes
from distillbook.use.teachers import load_teacher
from distillbook.use.training import read_metrics, train
from distillbook.rec.labels import Alphabet, SARClasses
from distillbook.rec.nets import PlainStudent, ppocrv3_rec
from small_nets import small_rec

A,B = Alphabet('abcdef'),Alphabet('fxayb')

def both(alphabet): return small_rec(alphabet, 2e-5)

@pytest.mark.parametrize('begin', ['random', 'mean'])
@pytest.mark.parametrize('make', [lambda: PlainStudent(len(A), (8,8,8,8)), lambda: both(A), lambda: ppocrv3_rec(len(A))], ids=['plain', 'heads', 'v3'])
def test_shared_characters_keep_their_scores(make, begin):
    net = make().eval()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    new = remap_classes(net, A, B, begin).eval()
    logits = {}
    def keep(name): return lambda m, i, o: logits.update({name: o})
    for name,n,k in (('old',net,len(A)), ('new',new,len(B))): [m for m in n.modules() if isinstance(m, nn.Linear) and m.out_features==k][-1 if name=='old' or k!=len(A)-0 else -1].register_forward_hook(keep(name))
    x = torch.randn(2,3,48,64)
    with torch.no_grad(): net(x); new(x)
    shared = [c for c in B.chars if c in A]
    old_at,new_at = [0]+A.encode(shared),[0]+B.encode(shared)
    assert shared==['f','a','b'] and torch.equal(logits['old'][...,old_at], logits['new'][...,new_at]) and logits['new'].shape[-1]==len(B)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_new_rows():
    net = PlainStudent(len(A), (8,8,8,8))
    mean = remap_classes(net, A, B, 'mean').fc.weight
    assert torch.allclose(mean[B.encode('x')[0]], net.fc.weight[1:].mean(0)) and torch.equal(mean[B.encode('x')[0]], mean[B.encode('y')[0]])
    torch.manual_seed(0); a = remap_classes(net, A, B).fc.weight
    torch.manual_seed(1); b = remap_classes(net, A, B).fc.weight
    differ = [c for c in B.chars if not torch.equal(a[B.encode(c)[0]], b[B.encode(c)[0]])]
    assert differ==['x','y']

def test_sar():
    net = both(A)
    new,a,b = remap_classes(net, A, B),SARClasses(A.chars),SARClasses(B.chars)
    old_d,new_d = net.head.sar_head.decoder,new.head.sar_head.decoder
    for c in 'fab':
        i,j = A.encode(c)[0]-1,B.encode(c)[0]-1
        assert torch.equal(old_d.embedding.weight[i], new_d.embedding.weight[j]) and torch.equal(old_d.prediction.weight[i], new_d.prediction.weight[j]) and old_d.prediction.bias[i]==new_d.prediction.bias[j]
    for i,j in ((a.unknown, b.unknown), (a.start, b.start)): assert torch.equal(old_d.embedding.weight[i], new_d.embedding.weight[j]) and torch.equal(old_d.prediction.weight[i], new_d.prediction.weight[j])
    assert not new_d.embedding.weight[b.pad].any() and (new_d.start, new_d.pad)==(b.start, b.pad) and new_d.embedding.padding_idx==b.pad
    assert [tuple(v.shape) for v in new.state_dict().values()]==[tuple(v.shape) for v in both(B).state_dict().values()] and new.head.ctc_head.fc.own_l2==2e-5
    label = torch.zeros(2,25,dtype=torch.long)
    assert new.train()(torch.randn(2,3,48,64), targets=[label, label+1, torch.ones(2).long(), torch.ones(2)])['head_out']['sar'].shape==(2,24 if False else 25,len(b)-1)

def test_there_and_back():
    net = both(A)
    wide = Alphabet('abcdefghij')
    back = remap_classes(remap_classes(net, A, wide), wide, A)
    assert all(torch.equal(v, back.state_dict()[k]) for k,v in net.state_dict().items())

def test_mistakes():
    with pytest.raises(UserError, match='no linear layer with 6 classes'): remap_classes(PlainStudent(7, (8,8,8,8)), Alphabet('abcde'), B)
    with pytest.raises(UserError, match='random'): remap_classes(PlainStudent(7, (8,8,8,8)), A, B, 'zero')
    with pytest.raises(UserError, match='no DBHead'): new_threshold(PlainStudent(7, (8,8,8,8)))

def test_threshold():
    net = ppocrv3_det().eval()
    new = new_threshold(net)
    assert not hasattr(net.head, 'thresh') and torch.equal(new.head.thresh.conv1.weight, net.head.binarize.conv1.weight) and not torch.equal(new.head.thresh.conv3.weight, net.head.binarize.conv3.weight)
    maps = new.train()(torch.randn(2,3,64,64))['maps']
    maps.sum().backward()
    assert maps.shape==(2,3,64,64) and new.head.thresh.conv1.weight.grad.abs().sum()>0 and net.head.binarize.conv1.weight.grad is None

# ---- a released reader on lines of one's own

@pytest.mark.parametrize('label,read,want', [('TOTAL SALES RM', 'Tota1SalesRM', 'Total Sales RM'), ('TOTAL', 'TOTAL', 'TOTAL'), ('TOTAL', '', 'TOTAL'), ('', 'abc', ''), ('abc', 'ABC', 'ABC'), ('12.50', 'l2.5O', '12.50'), ('TAX(RM)', 'Tax(RM)', 'Tax(RM)'), ('\u0130STANBUL', 'istanbul', '\u0130STANBUL'), ('STRASSE', 'Strasse', 'Strasse')])
def test_case_as_read(label, read, want): assert case_as_read(label, read)==want

def test_case_differs():
    reads,labels = ['Total 5', 'CASH', 'Tota1', 'a b', 'Ab'],['TOTAL 5', 'CASH', 'TOTAL', 'AB', 'aB']
    assert case_differs(reads, labels)==[('Total5', 'TOTAL5'), ('ab', 'AB'), ('Ab', 'aB')] and case_differs([], [])==[]
    with pytest.raises(ValueError): case_differs(['a'], [])

def test_statistics_stay():
    net = keep_statistics(small_rec(A)).train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {k: v.clone() for k,v in net.state_dict().items()}
    assert norms and all(type(m) is FixedBatchNorm2d and not m.training for m in norms) and net.training
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    for _ in range(2): net.train()(torch.randn(2,3,48,64)+2, targets=[torch.ones(2,25).long(), torch.ones(2,25).long(), torch.ones(2).long(), torch.ones(2)])['head_out']['ctc'].square().sum().backward()
    opt.step()
    after = net.state_dict()
    running = [k for k in after if 'running' in k or 'num_batches' in k]
    assert all(torch.equal(after[k], before[k]) for k in running) and any(not torch.equal(after[k], before[k]) for k in after)
    assert [k for k in before]==[k for k in small_rec(A).state_dict()] and type(copy.deepcopy(net).backbone.conv1._batch_norm) is FixedBatchNorm2d

def test_the_preset(tmp_path, caplog):
    "`configs/rec/finetune.yml` with nothing but data, and labels in capitals"
    for part,n,seed in (('train',8,1), ('val',6,2)): write_worn_lines(tmp_path, part, n, 'folded', seed, upper=True)
    data = [f'{side}.dataset.{k}' for side,part in (('Train','train'),('Eval','val')) for k in (f'data_dir={tmp_path}', f'label_file_list=[{tmp_path}/{part}.txt]')]
    exp = experiment(load_config('rec/finetune', [*data, 'Global.epoch_num=1', 'Train.loader.batch_size_per_card=4', f'Global.save_model_dir={tmp_path}/run', 'Global.use_gpu=false']))
    with caplog.at_level(logging.INFO): train(exp)
    assert 'of 8 labels ' in caplog.text and 'in capitals throughout' in caplog.text
    rows = read_metrics(tmp_path/'run/metrics.csv')
    assert [r['step'] for r in rows]==[0,2] and (tmp_path/'run/best_accuracy.pth').exists()
    released,now = load_teacher('PP-OCRv3_rec')[0].state_dict(),exp.nets['Model'].state_dict()
    assert all(torch.equal(released[k], now[k]) for k in now if 'running' in k) and sum('running' in k for k in now)==2*sum(isinstance(m, FixedBatchNorm2d) for m in exp.nets['Model'].modules())>60
    best,last = (load_file(tmp_path/f'run/{o}.pth') for o in ('best_accuracy','latest'))
    assert best['step']==(2 if rows[1]['acc']>=rows[0]['acc'] else 0) and all(torch.equal(last['model'][f'Model.{k}'], released[k])==k.startswith('backbone') for k,p in exp.nets['Model'].named_parameters() if p.ndim>1)
    for k,p in exp.nets['Model'].named_parameters():
        want = (released[k]+last['model'][f'Model.{k}'])/2 if best['step'] else released[k]
        assert torch.allclose(best['model'][f'Model.{k}'], want, atol=1e-6), k

def test_the_detectors_preset(tmp_path):
    "`configs/det/finetune.yml` with nothing but data (and smaller windows, for the time)"
    for part,n,seed in (('train',3,1), ('val',2,2)): write_pages(tmp_path/part, n, seed, 160, 160)
    data = [f'{side}.dataset.{k}' for side,part in (('Train','train'),('Eval','val')) for k in (f'data_dir={tmp_path}/{part}', f'label_file_list=[{tmp_path}/{part}/label.txt]')]
    exp = experiment(load_config('det/finetune', [*data, 'Global.epoch_num=1', 'Train.dataset.transforms.3.EastRandomCropData.size=[160,160]', 'Eval.dataset.transforms.2.DetResizeForTest={limit_side_len: 160, limit_type: min}', 'Optimizer.lr.warmup_epoch=0', f'Global.save_model_dir={tmp_path}/run', 'Global.use_gpu=false']))
    start = {k: v.clone() for k,v in exp.nets['Model'].state_dict().items()}
    released = load_teacher('PP-OCRv3_det').state_dict()
    assert all(torch.equal(start[k], v) for k,v in released.items()) and any('thresh' in k for k in set(start)-set(released))
    train(exp)
    assert [r['step'] for r in read_metrics(tmp_path/'run/metrics.csv')]==[0,1]
    now,best = exp.nets['Model'].state_dict(),load_file(tmp_path/'run/best_accuracy.pth')
    assert all(torch.equal(start[k], now[k]) for k in now if 'running' in k) and any(not torch.equal(start[k], now[k]) for k in now)
    assert best['step'] in (0,1)

@pytest.mark.parametrize('wear', WEAR)
def test_worn_lines(wear, tmp_path):
    a,b = (write_worn_lines(tmp_path/o, 'x', 3, wear, 5, upper=o=='b') for o in 'ab')
    assert b.read_text()==''.join(f"{p}\t{t.upper()}\n" for p,t in (l.split('\t') for l in a.read_text().splitlines()))
    assert all((tmp_path/f'a/x/{i:04}.png').read_bytes()==(tmp_path/f'b/x/{i:04}.png').read_bytes() for i in range(3))

def test_between():
    net = small_rec(A).eval()
    old = {k: v.clone() for k,v in net.state_dict().items()}
    between = Between(net, .25)
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn_like(p))
    now = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), between():
        inside = {k: v.clone() for k,v in net.state_dict().items()}
        1/0
    assert all(torch.allclose(inside[k], .75*old[k]+.25*now[k], atol=1e-6) for k in old if old[k].is_floating_point())
    assert all(torch.equal(v, now[k]) for k,v in net.state_dict().items())
    for share in (0, -1, 1.5):
        with pytest.raises(UserError, match='above 0'): Between(net, share)

def test_several_ranks_leave_fixed_norms_alone():
    devices = pytest.importorskip('distillbook.devices')
    nets = Nets(dict(kept=keep_statistics(conv_bn(3, 4)), other=conv_bn(3, 4)))
    devices._sync_batchnorm(nets)
    assert type(nets['kept'][1]) is FixedBatchNorm2d and isinstance(nets['other'][1], nn.SyncBatchNorm)

class NormAct(nn.BatchNorm2d):
    "As timm's: a norm with an activation behind it"
    def forward(self, x): return super().forward(x).relu()

def test_a_norm_that_does_more_goes_on_doing_it():
    net,x = nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)),torch.randn(2, 3, 5, 5)
    for _ in range(3): net(x)
    want = net.eval()(x)
    keep_statistics(net).train()
    again = pickle.loads(pickle.dumps(keep_statistics(net)))
    for o in (net, copy.deepcopy(net), again):
        assert torch.equal(o(x), want) and isinstance(o[1], NormAct) and isinstance(o[1], FixedBatchNorm2d) and not o.train()[1].training
    assert list(again.state_dict())==list(net.state_dict())
