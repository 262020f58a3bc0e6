"Weights as PaddlePaddle itself writes and reads them, and pickles that want more than to be read"
import copy, logging, pickle, struct
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from distillbook.core import UserError
from distillbook.det.nets import server_det
from distillbook.use.weights import *

GOLDEN = Path(__file__).parent/'golden'

class Layers(nn.Module):
    "The twin of the net of Paddle's layers in golden/paddle_layers.*"
    def __init__(self):
        super().__init__()
        self.conv,self.norm,self.up,self.layer_norm = nn.Conv2d(3, 4, 3, padding=1),nn.BatchNorm2d(4),nn.ConvTranspose2d(4, 4, 2, 2),nn.LayerNorm(4)
        self.rnn,self.rnn1 = nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True),nn.LSTM(10, 6, 2, batch_first=True)
        self.fc,self.emb = nn.Linear(6, 6),nn.Embedding(7, 6, padding_idx=6)

    def forward(self, x, ids):
        x = self.layer_norm(self.up(self.norm(self.conv(x))).mean(2).mT)
        return self.fc(self.rnn1(self.rnn(x)[0])[0]) + self.emb(ids)

@pytest.fixture
def layers():
    net = Layers().eval()
    assert load_weights(net, GOLDEN/'paddle_layers.pdparams')[1:]==([], [], [])
    return net

def test_paddles_layers_answer_the_same(layers):
    z = np.load(GOLDEN/'paddle_layers.npz')
    assert (z['ids']==6).any() and np.abs(z['y']).max() > 1
    with torch.no_grad(): y = layers(torch.tensor(z['x']), torch.tensor(z['ids'])).numpy()
    np.testing.assert_allclose(y, z['y'], rtol=0, atol=1e-6)

def test_written_as_paddle_writes(layers, tmp_path):
    "The same names, aliases too, and arrays to the last bit; but for the row of padding, which is 0 here as it is in Paddle's answers"
    save_weights(layers, tmp_path/'x.pdparams')
    theirs,ours = read_pdparams(GOLDEN/'paddle_layers.pdparams'),read_pdparams(tmp_path/'x.pdparams')
    assert len(theirs)==61 and ours.keys()==theirs.keys()
    assert [k for k in ours if not np.array_equal(ours[k], theirs[k]) or ours[k].dtype!=theirs[k].dtype]==['emb.weight']
    assert np.array_equal(ours['emb.weight'][:6], theirs['emb.weight'][:6]) and not ours['emb.weight'][6].any() and theirs['emb.weight'][6].any()

def test_state_of_an_optimiser_and_of_a_run():
    state = read_weights(GOLDEN/'paddle_layers.pdopt')
    assert len(state)==140 and state['linear_0.w_0_moment1_0'].shape==(6,6) and all(isinstance(v, np.ndarray) for v in state.values())
    assert read_pickle(GOLDEN/'paddle_layers.pdopt')['LR_Scheduler']['last_epoch']==3
    assert read_pickle(GOLDEN/'tiny_distill.states')==dict(best_model_dict=dict(acc=.5, norm_edit_dis=.75, best_epoch=1), epoch=3, global_step=42)

def test_half_precision_written_as_paddle_does(tmp_path):
    "paddle.load makes bfloat16 of integers of 16 bits; the numbers come back, rounded once"
    net = Layers()
    for half,kind in ((torch.bfloat16, np.uint16), (torch.float16, np.float16)):
        save_weights(copy.deepcopy(net).to(half), tmp_path/'h.pdparams')
        assert read_pickle(tmp_path/'h.pdparams')['fc.weight'].dtype==kind
        load_weights(other := Layers(), tmp_path/'h.pdparams')
        assert torch.equal(other.fc.weight, net.fc.weight.to(half).float()) and torch.equal(other.rnn.weight_hh_l1_reverse, net.rnn.weight_hh_l1_reverse.to(half).float())


# A state for another net

@pytest.mark.parametrize('change,says', [(lambda s: s.pop('fc.bias'), '1 missing'), (lambda s: s.update({'head.weight': torch.zeros(2,2)}), '1 unexpected'), (lambda s: s.update({'fc.weight': torch.zeros(6,5)}), '1 of another shape')])
def test_like_another_net_is_refused(change, says, tmp_path):
    state = Layers().state_dict()
    change(state)
    with pytest.raises(UserError, match=says): save_weights(state, tmp_path/'x.pdparams', like=Layers())
    with pytest.raises(UserError, match='unexpected'): save_weights({f'Student.{k}': v for k,v in Layers().state_dict().items()}, tmp_path/'x.pdparams', like=Layers())
    assert not list(tmp_path.iterdir())

def test_nothing_to_write_and_nowhere(tmp_path):
    with pytest.raises(UserError, match='no weights to write'): save_weights(nn.ReLU(), tmp_path/'x.pth')
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='could not be written'): save_weights(nn.Linear(1, 1), tmp_path/'file'/'x.pth')
    (tmp_path/'x.pth').mkdir()
    with pytest.raises(UserError, match='could not be written'): save_weights(nn.Linear(1, 1), tmp_path/'x.pth')
    assert sorted(p.name for p in tmp_path.iterdir())==['file','x.pth']


# The backbone alone

def backbone_arrays(net):
    return {**paddle_arrays(net.backbone, net.backbone.state_dict()), 'out.weight': np.zeros((9,1000), 'float32')}

@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_weights_of_the_backbone_alone(prefix, tmp_path, caplog):
    torch.manual_seed(0)
    given,net = server_det(),server_det()
    before = copy.deepcopy(net.state_dict())
    (tmp_path/'imagenet.pdparams').write_bytes(pickle.dumps({prefix+k: v for k,v in backbone_arrays(given).items()}))
    with caplog.at_level(logging.INFO, 'distillbook'): fit = load_weights(net, tmp_path/'imagenet.pdparams')
    assert 'weights of the backbone alone; neck and head begin anew' in caplog.text and 'out.weight' in caplog.text
    assert all(torch.equal(v, (given if k.startswith('backbone.') else None).state_dict()[k] if k.startswith('backbone.') else before[k]) for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked'))
    assert fit.unexpected==['backbone.out.weight'] and {k.partition('.')[0] for k in fit.missing}=={'neck','head'} and not fit.shapes

def test_a_part_of_a_backbone_is_not_enough(tmp_path):
    net = server_det()
    before = copy.deepcopy(net.state_dict())
    arrays = backbone_arrays(server_det())
    for change in (lambda a: a.pop(next(iter(a))), lambda a: a.update({next(iter(a)): np.zeros((1,1,1,1), 'float32')})):
        a = dict(arrays)
        change(a)
        (tmp_path/'b.pdparams').write_bytes(pickle.dumps(a))
        with pytest.raises(UserError, match='does not fit DetModel'): load_weights(net, tmp_path/'b.pdparams')
        assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())


# ONNX: one network, without a name

def test_onnx_wants_one_network():
    two = nn.ModuleDict(dict(Teacher=nn.Linear(1, 1), Student=nn.Linear(1, 1)))
    with pytest.raises(UserError, match="holds one network; which is to have it\\? net='Teacher' or 'Student'"): load_weights(two, 'PP-OCRv3_rec')
    with pytest.raises(UserError, match='does not fit Linear'): load_weights(two, 'PP-OCRv3_rec', net='Student')
    with pytest.raises(UserError, match="no net 'Pupil'"): load_weights(two, 'PP-OCRv3_rec', net='Pupil')
    with pytest.raises(UserError, match='holds one network'): extract('PP-OCRv3_rec', 'Student')


# Pickles that want more

def text(s): return b'X'+struct.pack('<I', len(s))+s.encode()

def array_with(kind_state, raw=bytes(32)):
    "A pickle of {'w': four float64}, with its own idea of the inner state of their type"
    kind = b'cnumpy\ndtype\n'+text('f8')+b'K\x00K\x01\x87R'+kind_state+b'b'
    return (b'\x80\x02}'+text('w')+b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85'+text('b')+b'\x87R'
            b'(K\x01K\x04\x85'+kind+b'\x89'+text(raw.decode('latin1'))+b'tbs.')

def state(flags): return b'(K\x03'+text('<')+b'NNN'+b'J\xff\xff\xff\xff'*2+b'K'+bytes([flags])+b't'

@pytest.mark.parametrize('flags', [0, 1, 2, 63])
def test_the_state_of_a_type_cannot_mislead_numpy(flags, tmp_path):
    "Flags that say that the numbers are references are not even looked at"
    (tmp_path/'x.pdparams').write_bytes(array_with(state(flags)))
    w = read_pdparams(tmp_path/'x.pdparams')['w']
    assert w.tolist()==[0.]*4 and w.dtype.flags==0 and not w.dtype.hasobject

@pytest.mark.parametrize('data,says', [
    (array_with(state(0), bytes(31)), 'or only a part'), (array_with(state(0), bytes(40)), 'or only a part'), (array_with(b'N'), 'or only a part'),
    (b'\x80\x02}'+text('w')+b'cnumpy\ndtype\n'+text('f8')+b'\x85Rs.', 'a _Kind'), (b'\x80\x02}'+text('w')+b'ccollections\nOrderedDict\ns.', 'a type'),
    (b'\x80\x02ccollections\nOrderedDict\nN}'+text('keys')+b'K\x01s\x86b.', 'not a'), (b'\x80\x02]q\x00h\x00a.', 'not a'), (b'\x80\x02}'+text('w')+b'cbuiltins\nexec\ns.', 'it wants to call builtins.exec'),
    (b'\x80\x02}'+text('w')+b'cnumpy.core.multiarray\n__class__\ns.', 'it wants to call'), (b'\x80\x02P0\n.', 'not a')])
def test_odd_pickles(data, says, tmp_path):
    (tmp_path/'x.pdparams').write_bytes(data)
    with pytest.raises(UserError, match=says) as e: read_pdparams(tmp_path/'x.pdparams')
    assert '\n' not in str(e.value)

def test_a_small_file_that_unfolds_to_a_huge_one_is_read_at_once(tmp_path):
    o = [1]
    for _ in range(60): o = [o, o]
    (tmp_path/'x.pdparams').write_bytes(pickle.dumps({'w': o}))
    assert (tmp_path/'x.pdparams').stat().st_size < 1000 and len(read_pickle(tmp_path/'x.pdparams')['w'])==2

def test_numpys_numbers_are_numbers(tmp_path):
    (tmp_path/'x.states').write_bytes(pickle.dumps(dict(acc=np.float64(.25), n=np.int32(3), m=(1, b'x', None, True))))
    got = read_pickle(tmp_path/'x.states')
    assert got==dict(acc=.25, n=3, m=[1, b'x', None, True]) and type(got['acc']) is float and type(got['n']) is int

@pytest.mark.parametrize('a', [np.asfortranarray(np.arange(6.).reshape(2,3)), np.arange(3, dtype='>i4'), np.array(2, 'f4'), np.zeros((0,3)), np.array([True, False]), np.arange(4, dtype='c8')])
def test_arrays_of_all_forms(a, tmp_path):
    for protocol in (2, 4):
        (tmp_path/'x.pdparams').write_bytes(pickle.dumps({'w': a, 'v': a}, protocol=protocol))
        got = read_pdparams(tmp_path/'x.pdparams')
        assert np.array_equal(got['w'], a) and got['w'].shape==a.shape and got['w'].dtype==a.dtype and got['w'].flags.writeable
