"Classes re-mapped character by character, and a threshold branch grown again"
import copy
import pytest, torch
from torch import nn
from distillbook.core import UserError
from distillbook.det.nets import plain_det, ppocrv3_det
from distillbook.use.finetune import new_threshold, remap_classes
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
