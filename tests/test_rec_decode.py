"Greedy decoding and the recognition metric against PaddleOCR's, and against cases worked by hand"
import itertools, json, math, numpy as np, pytest, torch
from pathlib import Path
from types import SimpleNamespace
from distillbook.rec.decode import RecMetric, compare, ctc_decode, greedy, mark_errors
from distillbook.rec.labels import Alphabet, encode_batch

golden = np.load(Path(__file__).parent/'golden'/'post_rec.npz')
meta = lambda case: json.loads(str(golden[f'{case}|meta']))
alphabet = Alphabet('0123456789abcdefghijklmnopqrstuvwxyz')
assert ['blank']+alphabet.chars == meta('CTC_default_dict')['characters']

def check(got, want):
    assert [t for t,_ in got] == [t for t,_ in want]
    np.testing.assert_allclose([c for _,c in got], [c for _,c in want], rtol=1e-5)

@pytest.mark.parametrize('case', ['CTC_default_dict','CTC_no_label'])
def test_decode_equals_paddle(case): check(ctc_decode(torch.from_numpy(golden[f'{case}|in|preds']).log(), alphabet), meta(case)['result'])

def test_one_decoder_for_every_net():
    "PaddleOCR has a decoder class for distillation; here the plain one is used on each net's output"
    want = meta('DistillationCTC')['result']
    preds = torch.from_numpy(golden['CTC_default_dict|in|preds']).log()
    check(ctc_decode(preds, alphabet), want['Student'][0])
    check(ctc_decode(preds.flip(0), alphabet), want['Teacher'][0])

def test_labels_keep_repeats():
    label = golden['CTC_default_dict|in|label']
    assert [alphabet.decode(o) for o in label.tolist()] == [t for t,_ in meta('CTC_default_dict')['label']]
    assert '00' in [alphabet.decode(o) for o in torch.from_numpy(label)]

def test_greedy_by_the_rule():
    "Every path of 5 frames over 3 classes, collapsed by groupby"
    paths = torch.tensor(list(itertools.product(range(3), repeat=5)))
    torch.manual_seed(0)
    logits = torch.randn(len(paths), 5, 3)
    logits.scatter_(-1, paths[...,None], 6+torch.rand(len(paths), 5, 1))
    probs = logits.double().softmax(-1)
    ids,conf = greedy(logits)
    assert ids.dtype == torch.int64 and conf.dtype == torch.float32
    for path,p,i,c in zip(paths.tolist(), probs, ids.tolist(), conf.tolist()):
        starts = [(k,t) for k,t in ((k,next(g)) for k,g in itertools.groupby(range(5), key=lambda t: path[t])) if k]
        assert [o for o in i if o] == [k for k,_ in starts] and [t for t,o in enumerate(i) if o] == [t for _,t in starts]
        assert c == pytest.approx(np.mean([p[t,k].item() for k,t in starts]) if starts else 0., rel=1e-5)

def test_confidence_is_the_same_in_half_precision():
    x = (torch.randn(2, 10, 37)*3).bfloat16()
    assert ctc_decode(x, alphabet) == ctc_decode(x.float(), alphabet)
    assert greedy(x)[1].dtype == torch.float32

def test_no_look_at_the_numbers():
    "On the meta device anything that reads a value back raises"
    ids,conf = greedy(torch.empty(2, 40, 6625, device='meta'))
    assert ids.device.type == conf.device.type == 'meta' and ids.shape == (2,40) and conf.shape == (2,)
    with pytest.raises(Exception): torch.empty(2, device='meta').sum().item()

def test_no_graph_is_kept(): assert not greedy(torch.randn(1, 4, 5, requires_grad=True))[1].requires_grad

@pytest.mark.parametrize('case', ['RecMetric_0','RecMetric_1'])
def test_compare_equals_paddle(case):
    "PaddleOCR's numbers, with its 1e-5 in the denominators put back"
    m = meta(case)
    ignore = m['kwargs'].get('ignore_space', True)
    per_batch = [[compare(r[0], t[0], ignore) for r,t in zip(*b)] for b in m['batches']]
    for rows,want in [*zip(per_batch, m['per_batch']), (sum(per_batch, []), m['total'])]:
        n = len(rows)
        assert want['acc'] == pytest.approx(sum(r for r,_ in rows)/(n+1e-5), rel=1e-12)
        assert want['norm_edit_dis'] == pytest.approx(1-sum(1-s for _,s in rows)/(n+1e-5), rel=1e-12)

@pytest.mark.parametrize('read,truth,right,similar', [
    ('kitten','sitting',False,4/7), ('','',True,1), ('','ab',False,0), ('ab','',False,0), ('Ab','ab',False,.5), ('abcd','abxd',False,.75), ('a b','ab ',True,1)])
def test_compare_by_hand(read, truth, right, similar):
    got = compare(read, truth)
    assert got[0] == right and got[1] == pytest.approx(similar)

def logits_of(texts, a, T=12):
    x = torch.zeros(len(texts), T, len(a))
    for row,text in zip(x, texts):
        ids = [i for c in a.encode(text) for i in (c,0)]
        for t,i in enumerate(ids+[0]*(T-len(ids))): row[t,i] = 9
    return x

def test_metric():
    a = Alphabet('abc ')
    met = RecMetric(a)
    assert met.names == ('acc','norm_edit_dis')
    for read,truth in [(['ab','c'],['ab','abc']), (['a b'],['ab'])]:
        met.accumulate(SimpleNamespace(pred=logits_of(read, a), yb=encode_batch(truth, a, 5)))
    assert met.value == dict(acc=2/3, norm_edit_dis=pytest.approx((1+1/3+1)/3))
    met.reset()
    met.accumulate(SimpleNamespace(pred=logits_of(['ab'], a), yb=encode_batch(['ab'], a, 5)))
    assert met.value == dict(acc=1., norm_edit_dis=1.)
    strict = RecMetric(a, ignore_space=False)
    strict.accumulate(SimpleNamespace(pred=logits_of(['a b'], a), yb=encode_batch(['ab'], a, 5)))
    assert strict.value == dict(acc=0., norm_edit_dis=pytest.approx(2/3))

def test_metric_of_nothing_is_nan():
    "PaddleOCR says accuracy 0 and similarity 1 of no lines at all"
    assert all(math.isnan(o) for o in RecMetric(alphabet).value.values())

def test_metric_reads_no_padding():
    a = Alphabet('ab')
    met = RecMetric(a)
    met.accumulate(SimpleNamespace(pred=logits_of(['a'], a), yb=(torch.tensor([[1,2,2]]),torch.tensor([1]))))
    assert met.value['acc'] == 1

@pytest.mark.parametrize('truth,read,marked', [
    ('hello','hello','hello'), ('hello','he1lo','he[1]lo'), ('hello','ello','[]ello'), ('hello','hellow','hello[w]'), ('ab','','[]'), ('','ab','[ab]'), ('',"",'')])
def test_mark_errors(truth, read, marked): assert mark_errors(truth, read) == marked
