"Greedy decoding and the recognition metric against PaddleOCR's, and against cases worked by hand"
import itertools, json, math, matplotlib.pyplot as plt, numpy as np, pytest, torch
from pathlib import Path
from types import SimpleNamespace
from distillbook.core import UserError
from distillbook.rec.decode import (CTCDecoder, RecMetric, SARDecoder, are_probs, compare_texts, ctc_decode, draw_reads, greedy, label_texts,
    mark_errors, sar_decode, word_boxes)
from distillbook.rec.labels import Alphabet, SARClasses, encode_batch, multi_label

golden = np.load(Path(__file__).parent/'golden'/'post_rec.npz')
meta = lambda case: json.loads(str(golden[f'{case}|meta']))
alphabet = Alphabet('0123456789abcdefghijklmnopqrstuvwxyz')
assert ['blank']+alphabet.chars == meta('CTC_default_dict')['characters']

def check(got, want):
    assert [t for t,_ in got] == [t for t,_ in want]
    np.testing.assert_allclose([c for _,c in got], [c for _,c in want], rtol=1e-5)

@pytest.mark.parametrize('case', ['CTC_default_dict','CTC_no_label'])
def test_decode_equals_paddle(case):
    preds = torch.from_numpy(golden[f'{case}|in|preds'])
    check(ctc_decode(preds, alphabet, probs=True), meta(case)['result'])
    check(ctc_decode(preds.log(), alphabet), meta(case)['result'])

def test_word_boxes_equal_paddle():
    "PaddleOCR's entry: frames that see the picture, characters of the words, their frames, kinds"
    m,preds = meta('CTC_word_box'),torch.from_numpy(golden['CTC_word_box|in|preds'])
    for ids,ratio,(text,_,want) in zip(greedy(preds, probs=True)[0], m['wh_ratio_list'], m['result']):
        words = word_boxes(ids, alphabet)
        assert ''.join(w for w,*_ in words) == text
        assert len(ids)*ratio/m['max_wh_ratio'] == pytest.approx(want[0])
        assert [[list(w) for w,*_ in words], [f for _,f,_ in words], [k for *_,k in words]] == want[1:]

@pytest.mark.parametrize('text,want', [('ab cd','ab cd'), ('v3.5.','v3.5'), ('.5','5'), ('a-b -c','a-b c'), ('a.b','a b'), ('1..2','1 2'), ('深度a1学','深度 a1 学'), ('--',''), ('',''), ('a- b','a- b'), ('深-a','深 a'), ('é1','1')])
def test_words_by_hand(text, want):
    a = Alphabet(sorted(set(text+'x')))
    ids = torch.tensor([o for i in a.encode(text) for o in (0,i)] or [0])
    words = word_boxes(ids, a)
    assert ' '.join(w for w,*_ in words) == want
    assert all(text[t//2]==c for w,frames,_ in words for c,t in zip(w, frames, strict=True))

def test_sar_equals_paddle():
    m,sar,preds = meta('SAR_default_dict'),SARClasses(alphabet.chars),torch.from_numpy(golden['SAR_default_dict|in|preds'])
    for key,kw in [('result',{}), ('rm_symbol',dict(rm_symbol=True))]:
        want = [(t, math.nan if c is None else c) for t,c in m[key]]
        check(sar_decode(preds, sar, probs=True, **kw), want)
        check(sar_decode(preds.log(), sar, **kw), want)
    assert label_texts(torch.from_numpy(golden['SAR_default_dict|in|label']), sar) == [tuple(o) for o in m['label']]

def test_sar_keeps_repeats_and_stops_at_the_end():
    sar = SARClasses('ab')
    x = torch.nn.functional.one_hot(torch.tensor([[0,0,1,sar.start,1],[sar.start,0,0,0,0],[1,1,1,1,1]]), len(sar)-1)*9.
    assert [t for t,_ in sar_decode(x, sar)] == ['aab','','bbbbb']
    assert sar_decode(x.bfloat16(), sar)[2] == sar_decode(x, sar)[2]

@pytest.mark.parametrize('decode,classes', [(ctc_decode,alphabet), (sar_decode,SARClasses(alphabet.chars))])
def test_logits_are_no_probabilities(decode, classes):
    x = torch.randn(2, 6, 37, generator=torch.Generator().manual_seed(0))*3
    x[...,-1] = -9
    with pytest.raises(UserError, match='no probabilities'): decode(x, classes, probs=True)

def test_one_decoder_for_every_net():
    "PaddleOCR has a decoder class for distillation; here the plain one is used on each net's output"
    want = meta('DistillationCTC')['result']
    preds = torch.from_numpy(golden['CTC_default_dict|in|preds']).log()
    check(ctc_decode(preds, alphabet), want['Student'][0])
    check(ctc_decode(preds.flip(0), alphabet), want['Teacher'][0])

def test_labels_keep_repeats():
    label = golden['CTC_default_dict|in|label']
    assert label_texts(torch.from_numpy(label), alphabet) == [tuple(o) for o in meta('CTC_default_dict')['label']]
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

@pytest.mark.parametrize('case', [f'RecMetric_{i}' for i in range(4)])
def test_metric_equals_paddle(case):
    "Batch by batch, in all, and of nothing; the reads once as PaddleOCR's pairs and once as plain texts"
    m = meta(case)
    make = lambda: RecMetric(alphabet, eps=1e-5, **m['kwargs'])
    total = make()
    for (reads,truths),want in zip(m['batches'], m['per_batch'], strict=True):
        one = make()
        one.add([r for r,_ in reads], [t for t,_ in truths])
        total.add(reads, truths)
        assert one.value == pytest.approx(want, rel=1e-12)
    assert total.value == pytest.approx(m['total'], rel=1e-12)
    total.reset()
    assert total.value == m['after_reset']

def test_one_metric_for_every_net():
    "PaddleOCR's DistillationMetric is its plain metric once per net; the names of the others get a prefix"
    want,batches = meta('DistillationMetric_rec')['metric'],meta('RecMetric_1')['batches']
    got = {}
    for prefix in ('','Teacher_'):
        met = RecMetric(alphabet, eps=1e-5, ignore_space=False)
        for reads,truths in batches: met.add(reads, truths)
        got |= {prefix+k:v for k,v in met.value.items()}
    assert got == pytest.approx(want, rel=1e-12)

def test_as_many_reads_as_truths():
    with pytest.raises(ValueError): RecMetric(alphabet).add(['a','b'], ['a'])

def paddle_batch(truths, alphabet, max_len):
    rows = [multi_label(o, SARClasses(alphabet.chars), max_len) for o in truths]
    label_ctc,label_sar,length = (torch.as_tensor(np.stack([o[k] for o in rows])) for k in ('label_ctc','label_sar','length'))
    return label_ctc, label_sar, length, torch.ones(len(rows), dtype=torch.float64)

def test_paddle_batches():
    "Logits and labels as in a Python run; PaddleOCR's four targets with the probabilities of validation, and with the dict of training"
    a = Alphabet('abc ')
    reads,truths = ['ab','c','abc'],['ab','abc','abc']
    x = logits_of(reads, a)
    want = dict(acc=2/3, norm_edit_dis=pytest.approx((1+1/3+1)/3))
    for pred in (x, x.softmax(-1), dict(ctc=x, sar=None)):
        for yb,kw in [(encode_batch(truths, a, 5), {}), (paddle_batch(truths, a, 5), dict(length=2))]:
            met = RecMetric(a, **kw)
            met.accumulate(SimpleNamespace(pred=pred, yb=yb))
            assert met.value == want
    with pytest.raises(UserError, match=r'target 1 has shape \[3, 5\] .* RecMetric\(length=\)'): RecMetric(a).accumulate(SimpleNamespace(pred=x, yb=paddle_batch(truths, a, 5)))

@pytest.mark.parametrize('read,truth,right,similar', [
    ('kitten','sitting',False,4/7), ('','',True,1), ('','ab',False,0), ('ab','',False,0), ('Ab','ab',False,.5), ('abcd','abxd',False,.75), ('a b','ab ',True,1)])
def test_compare_by_hand(read, truth, right, similar):
    got = compare_texts(read, truth)
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

# Decoders as objects

@pytest.mark.parametrize('array', [torch.from_numpy, lambda o: o], ids=['tensor','array'])
def test_ctc_decoder(array):
    "Probabilities and logits are told apart; labels bring the truths"
    probs,label,m = golden['CTC_default_dict|in|preds'],golden['CTC_default_dict|in|label'],meta('CTC_default_dict')
    decode = CTCDecoder(alphabet)
    check(decode(array(probs)), m['result'])
    check(decode(array(np.log(probs))), m['result'])
    reads,truths = decode(array(probs), torch.from_numpy(label))
    check(reads, m['result'])
    assert truths == [tuple(o) for o in m['label']]
    assert (CTCDecoder.head, CTCDecoder.classes) == ('ctc', Alphabet)

def test_sar_decoder():
    m,preds = meta('SAR_default_dict'),torch.from_numpy(golden['SAR_default_dict|in|preds'])
    for key,kw in [('result',{}), ('rm_symbol',dict(rm_symbol=True))]:
        decode,want = SARDecoder(SARClasses(alphabet.chars), **kw),[(t, math.nan if c is None else c) for t,c in m[key]]
        check(decode(preds), want)
        check(decode(preds.log()), want)
    assert decode(preds, torch.from_numpy(golden['SAR_default_dict|in|label']))[1] == [tuple(o) for o in m['label']]
    assert (SARDecoder.head, SARDecoder.classes) == ('sar', SARClasses)

def test_are_probs():
    x = torch.randn(2, 5, 7)
    assert are_probs(x.softmax(-1)) and are_probs(x.softmax(-1).bfloat16())
    assert not are_probs(x) and not are_probs(x.abs()) and not are_probs(x.log_softmax(-1)) and not are_probs(x+float('nan'))

# Pictures of what was read

def notes(fig): return [(t.get_text(), t.get_color()) for ax in fig.axes for t in ax.texts]

@pytest.fixture
def closed():
    yield
    plt.close('all')

def test_draw_reads(closed):
    x,truths = torch.zeros(4, 3, 48, 64),[(t, 1.) for t in ('ab','cd','ef','gh')]
    reads = [('ab',.9), ('cx',.5), ('',0.), ('gh',1.)]
    fig = draw_reads((x, None), dict(Student=(reads, truths), Teacher=(truths, truths)), n=3)
    assert len([ax for ax in fig.axes if ax.images]) == 3
    assert notes(fig) == [('Student: ab','black'), ('Teacher: ab','black'), ('Student: c[x]','crimson'), ('Teacher: cd','black'), ('Student: []','crimson'), ('Teacher: ef','black')]
    assert notes(draw_reads((x,), (reads, truths)))[1] == ('c[x]','crimson')
    assert len(notes(draw_reads((x[:1],), (reads[:1], truths[:1])))) == 1

def test_draw_reads_shows_the_picture(closed):
    "Blue first and -1..1 become red first and 0..1"
    x = torch.tensor([1., 0., -1.])[:,None,None].expand(3, 8, 10)
    shown = draw_reads((x[None].bfloat16(),), ([('a',1.)], [('a',1.)])).axes[0].images[0].get_array()
    assert shown.shape == (8, 10, 3) and shown[0,0].tolist() == [0., .5, 1.]
