"The networks of distillbook.rec.nets against PaddleOCR's own numbers (golden/README.md says how they were made)"
import json
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from distillbook.core import UserError
from distillbook.rec.nets import *
from weights_formula import fill

GOLDEN = Path(__file__).parent/'golden'
ALIAS = {'_mean': 'running_mean', '_variance': 'running_var'}

def ours(name):
    "PaddleOCR's name of a parameter or buffer -> the name in our state_dict"
    head,_,leaf = name.rpartition('.')
    return f'{head}.{ALIAS.get(leaf, leaf)}'

def to_torch(a, net, name):
    "A Paddle array for the place `name`: linear weights stand the other way round"
    t = torch.from_numpy(np.asarray(a))
    return t.T if isinstance(net.get_submodule(name.rpartition('.')[0]), nn.Linear) and t.ndim==2 else t

def set_weights(net, arrays):
    "All of `arrays` (PaddleOCR's names) into `net`, all of whose places must be filled"
    sd = {ours(k): to_torch(a, net, ours(k)) for k,a in arrays.items()}
    missing,unexpected = net.load_state_dict(sd, strict=False)
    assert not unexpected and all(m.endswith('num_batches_tracked') for m in missing)

class Case:
    "One golden case: inputs, outputs, and a net with the weights that gave them"
    def __init__(self, file, name):
        self.z,self.name = np.load(GOLDEN/file),name
        self.meta = json.loads(str(self.z[f'{name}|meta']))
        self.x = torch.from_numpy(self.z[f'{name}|in|x0'])
        self.y = self.z[f'{name}|out|y']
    def weights(self):
        if self.meta['weights']=='formula': return {k: fill(k, s) for k,s in self.meta['shapes'].items()}
        stem = self.name.split('/')[0]
        return {k: self.z[f'{stem}|w|{k}'] for k in self.meta['shapes']}
    def net(self):
        kw = dict(self.meta['kwargs'])
        if self.meta['cls']=='MobileNetV1Enhance': net = MobileNetV1Enhance(**kw)
        elif self.meta['cls']=='SequenceEncoder': net = SequenceEncoder(EncoderWithSVTR(self.meta['in_channels'], **kw))
        else: net = CTCHead(self.meta['in_channels'], self.meta['out_channels'])
        set_weights(net, self.weights())
        return net.train(self.meta['mode']=='train')

SMALL,FULL = 'modules_small_rec.npz','modules_rec_full.npz'
EVAL = [(SMALL, 'MobileNetV1Enhance_s.0625/eval'), (SMALL, 'SVTRneck_small/eval'), (SMALL, 'SVTRneck_small_noguide_k13/eval'),
    (FULL, 'MobileNetV1Enhance_s.5_pool22/eval'), (FULL, 'MobileNetV1Enhance_s.5_pool_default32/eval'),
    (FULL, 'MobileNetV1Enhance_s.5_maxpool/eval'), (FULL, 'SVTRneck_full/eval')]
TRAIN = [(SMALL, 'MobileNetV1Enhance_s.0625/train'), (SMALL, 'SVTRneck_small/train'), (SMALL, 'SVTRneck_small_noguide_k13/train'),
    (SMALL, 'CTCHead/train'), (FULL, 'MobileNetV1Enhance_s.5_pool22/train'), (FULL, 'SVTRneck_full_nodrop/train')]

def close(a, b, rel=1e-5): np.testing.assert_allclose(a, b, rtol=0, atol=rel*np.abs(b).max())

@pytest.mark.parametrize('file,name', EVAL)
def test_eval(file, name):
    c = Case(file, name)
    with torch.no_grad(): y = c.net()(c.x)
    close(y.numpy(), c.y)

def test_ctc_head_gives_logits_in_eval():
    "PaddleOCR's head gives probabilities in eval mode; ours gives logits always"
    c = Case(SMALL, 'CTCHead/eval')
    with torch.no_grad(): y = c.net()(c.x)
    close(y.softmax(-1).numpy(), c.y)

def probe(y):
    "The scalar whose gradients the goldens hold"
    return (y * torch.arange(y.numel(), dtype=y.dtype).mul(0.37).cos().reshape(y.shape)).sum()

@pytest.mark.parametrize('file,name', TRAIN)
def test_train(file, name):
    c = Case(file, name)
    net = c.net()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    sizes = {}
    for k,m in net.named_modules():
        if isinstance(m, nn.BatchNorm2d): m.register_forward_hook(lambda m,i,o,k=k: sizes.__setitem__(k, i[0].numel()//i[0].shape[1]))
    x = c.x.clone().requires_grad_()
    y = net(x)
    close(y.detach().numpy(), c.y)
    probe(y).backward()

    if c.meta['grad_x_none'][0]: assert x.grad is None
    else: close(x.grad.numpy(), c.z[f'{name}|grad|x0'], 1e-4)
    big = max(c.meta['gradnorm'].values())
    for k,want in c.meta['gradnorm'].items():
        got = net.get_parameter(ours(k)).grad.norm().item()
        assert abs(got-want) <= 1e-4*want + 1e-5*big, (k, got, want)

    after = [k.split('|')[-1] for k in c.z.files if k.startswith(f'{name}|bn_after|')]
    assert bool(after) == bool(sizes)
    for k in after:
        # torch puts the unbiased variance of the batch, n/(n-1) times Paddle's, into its running mean
        n,old = sizes[ours(k).rpartition('.')[0]],before[ours(k)]
        got = net.state_dict()[ours(k)]
        if k.endswith('_variance'): got = 0.9*old + (got-0.9*old)*(n-1)/n
        close(got.numpy(), c.z[f'{name}|bn_after|{k}'])

def test_names_and_shapes_are_paddles():
    rows = json.loads((GOLDEN/'params_rec_student.json').read_text())
    net = ppocrv3_rec()
    have = {k: list(to_torch(v, net, k).shape) for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert have == {ours(k): s for k,s in rows}

# Shapes, parts, what a stranger may do wrong

NETS = dict(ppocrv3=lambda: ppocrv3_rec(63), plain=lambda: PlainStudent(63))

@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
@pytest.mark.parametrize('width', [8, 64, 160, 328])
def test_one_vote_for_eight_pixels(make, width):
    with torch.no_grad(): assert make().eval()(torch.zeros(2, 3, 48, width)).shape==(2, width//8, 63)

@pytest.mark.parametrize('make', NETS.values(), ids=NETS)
def test_a_step_reaches_what_it_should(make):
    "Every parameter gets a gradient from the logits, except PP-OCRv3's backbone, which `use_guide` cuts off"
    net = make().train()
    net(torch.randn(2, 3, 48, 64)).square().sum().backward()
    without = {k.split('.')[0] for k,p in net.named_parameters() if p.grad is None}
    assert without==({'backbone'} if hasattr(net, 'backbone') else set())

def test_all_feats():
    net,x = ppocrv3_rec(63, return_all_feats=True).eval(),torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        outs = net(x)
        net.return_all_feats = False
        assert torch.equal(net(x), outs['head_out']['ctc'])
    assert list(outs)==['backbone_out', 'neck_out', 'head_out'] and list(outs['head_out'])==['ctc']
    assert outs['backbone_out'].shape==(2, 512, 1, 8) and outs['neck_out'].shape==(2, 8, 64)

@pytest.mark.parametrize('height', [64, 96])
def test_wrong_height(height):
    net = ppocrv3_rec(63).eval()
    with pytest.raises(UserError, match='48 pixels high'): net(torch.zeros(1, 3, height, 64))

def test_sliced():
    net,x,columns = ppocrv3_rec(63).eval(),torch.randn(2, 3, 48, 64),torch.tensor([0, 5, 2, 62])
    few = Sliced(net, columns).eval()
    with torch.no_grad():
        assert torch.equal(few(x), net(x)[..., [0, 5, 2, 62]])
        net.return_all_feats = True
        whole,part = net(x),few(x)
    assert torch.equal(part['head_out']['ctc'], whole['head_out']['ctc'][..., columns])
    assert torch.equal(part['neck_out'], whole['neck_out'])
    assert [k for k,_ in few.named_buffers() if k=='columns'] and sum(1 for _ in few.parameters())==sum(1 for _ in net.parameters())

def test_small_enough():
    assert sum(p.numel() for p in PlainStudent(63).parameters()) == 513_519
    assert sum(p.numel() for p in ppocrv3_rec().parameters())==2_639_665

def test_student_wants_four_channels():
    with pytest.raises(UserError, match='four channels'): PlainStudent(63, (8, 8, 8))

def test_initial_weights():
    "PaddleOCR's: convolutions sqrt(2/fan_in), the neck's linear layers 0.02, the head uniform within 1/sqrt(fan_in)"
    torch.manual_seed(0)
    net = ppocrv3_rec()
    for k,m in net.named_modules():
        if isinstance(m, nn.Conv2d):
            w = m.weight
            assert abs(w.std().item()/(2/w[0].numel())**0.5 - 1) < 0.15, k
            assert m.bias is None or not m.bias.any()
        if isinstance(m, nn.Linear) and 'ctc_encoder' in k: assert abs(m.weight.std().item()/0.02 - 1) < 0.05 and not m.bias.any()
    fc = net.head.ctc_head.fc
    for t in (fc.weight, fc.bias): assert 0.99/8 < t.abs().max() <= 1/8 and abs(t.std().item()*8*3**0.5 - 1) < 0.05
