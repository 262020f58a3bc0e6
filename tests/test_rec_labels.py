"Alphabets, CTC and SAR labels: PaddleOCR's own labels, files that are read, and input that will not do"
import json, numpy as np, onnx, pytest, torch
from onnx import helper as oh, TensorProto as tp
from pathlib import Path
from distillbook.core import UserError
from distillbook.rec.labels import (Alphabet, SARClasses, ctc_label, drop_unknown, encode_batch, label_fault, label_report, multi_label, read_characters, refusal_reason,
    sar_label, usable_labels)

GOLDEN = Path(__file__).parent/'golden'
KEYS = GOLDEN/'ppocr_keys_v1.txt'
targets = np.load(GOLDEN/'targets_rec.npz')

@pytest.mark.parametrize('case,lower,alphabet', [
    ('CTCLabelEncode_default', True, lambda: Alphabet('0123456789abcdefghijklmnopqrstuvwxyz')),
    ('CTCLabelEncode_keys_v1_space', False, lambda: Alphabet.from_file(KEYS, use_space_char=True)),
    ('CTCLabelEncode_keys_v1_nospace_len10', False, lambda: Alphabet.from_file(KEYS))])
def test_labels_equal_paddle(case, lower, alphabet):
    "PaddleOCR's labels, wherever it drops no character; whatever it refuses we refuse too; and what it would change we refuse"
    meta,alphabet = json.loads(str(targets[f'{case}|meta'])),alphabet()
    max_len = meta['kwargs']['max_text_length']
    assert len(alphabet) == meta['n_char']
    same = changed = 0
    for i,text in enumerate(meta['texts']):
        if lower: text = text.lower()
        why = label_fault(text, alphabet, max_len)
        if i in meta['none']:
            assert why
            continue
        want,length = targets[f'{case}|out|t{i}_label'],int(targets[f'{case}|out|t{i}_length'])
        if why:
            assert length < len(text) and 'not in the alphabet' in why
            changed += 1
        else:
            labels,lengths = encode_batch([text], alphabet, max_len)
            assert labels[0].tolist() == want.tolist() and lengths.tolist() == [length]
            assert alphabet.decode(labels[0]) == text
            same += 1
    assert same+changed+len(meta['none']) == len(meta['texts']) and same >= 5 and changed >= 1

SUFFIXES = {'default': (None, {}), 'keys_v1_space': (KEYS, dict(use_space_char=True)), 'keys_v1_nospace_len10': (KEYS, {})}

def encoder(kind, suffix):
    "A function from text to what PaddleOCR's encoder of that name gives, and its classes"
    path,kw = SUFFIXES[suffix]
    sar,lower = SARClasses(read_characters(path, **kw)),path is None
    def single(f, classes): return lambda text, n: dict(zip(('label','length'), f(text, classes, n, lower)))
    return {'CTC': (single(ctc_label, sar.alphabet), sar.alphabet), 'SAR': (single(sar_label, sar), sar),
            'Multi': (lambda text, n: multi_label(text, sar, n, lower), sar)}[kind]

@pytest.mark.parametrize('kind', ['CTC','SAR','Multi'])
@pytest.mark.parametrize('suffix', SUFFIXES)
def test_encoders_equal_paddle(kind, suffix):
    "Every class of every row, every length, and every refusal of PaddleOCR's three encoders with three dictionaries"
    case = f'{kind}LabelEncode_{suffix}'
    meta,(encode,classes) = json.loads(str(targets[f'{case}|meta'])),encoder(kind, suffix)
    max_len = meta['kwargs']['max_text_length']
    if kind!='Multi': assert len(classes) == meta['n_char']
    if kind=='SAR': assert (classes.start, classes.pad, classes.unknown) == (meta['start'], meta['pad'], meta['ukn'])
    for i,text in enumerate(meta['texts']):
        if i in meta['none']:
            with pytest.raises(UserError, match='empty|longer than|no character'): encode(text, max_len)
            continue
        got,want = encode(text, max_len),{k.removeprefix(f'{case}|out|t{i}_'): targets[k] for k in targets.files if k.startswith(f'{case}|out|t{i}_')}
        assert got.keys() == want.keys()
        for k,v in want.items(): assert np.array_equal(got[k], v) and (k=='length' or got[k].dtype==np.int64), (text,k)

@pytest.mark.parametrize('suffix', SUFFIXES)
def test_report_counts_what_paddle_does(suffix):
    meta = json.loads(str(targets[f'MultiLabelEncode_{suffix}|meta']))
    path,kw = SUFFIXES[suffix]
    max_len,alphabet = meta['kwargs']['max_text_length'],Alphabet(read_characters(path, **kw))
    report = label_report(meta['texts'], alphabet, max_len, lower=path is None, signs=2)
    short = [i for i,t in enumerate(meta['texts']) if i not in meta['none'] and targets[f'MultiLabelEncode_{suffix}|out|t{i}_length'] < len(t)]
    assert report['labels'] == len(meta['texts']) and report['refused'].total() == len(meta['none']) and report['cut'] == len(short) >= 1
    assert set(report['dropped']) <= {'∎',' '}

def test_dictionary_sizes():
    meta = json.loads(str(np.load(GOLDEN/'post_rec.npz')['dict_sizes|meta']))
    spaced,sar = Alphabet.from_file(KEYS, use_space_char=True),SARClasses(read_characters(KEYS, use_space_char=True))
    assert (len(spaced), len(Alphabet.from_file(KEYS)), len(sar)) == (meta['ppocr_keys_v1_space'], meta['ppocr_keys_v1_nospace'], meta['sar_space'])
    assert spaced.chars[:4] == meta['first'][1:] and spaced.chars[-3:] == meta['last'] and sar.names[-4:] == meta['sar_last']
    assert (sar.start, sar.pad, sar.unknown) == (meta['sar_start'], meta['sar_pad'], meta['sar_unknown'])

def test_no_dictionary():
    assert ''.join(read_characters()) == ''.join(read_characters(use_space_char=True)) == '0123456789abcdefghijklmnopqrstuvwxyz'
    with pytest.raises(UserError, match='No such file'): read_characters('none.txt')

@pytest.mark.parametrize('n,ctc,sar', [(23,True,True), (24,True,False), (25,True,False), (26,False,False)])
def test_room_in_a_row_of_25(n, ctc, sar):
    classes = SARClasses('ab')
    for f,c,fits in [(ctc_label,classes.alphabet,ctc), (sar_label,classes,sar), (multi_label,classes,sar)]:
        if fits: f('a'*n, c, 25)
        else:
            with pytest.raises(UserError, match="'a+': longer than"): f('a'*n, c, 25)

def test_length_is_counted_before_and_after_dropping():
    "PaddleOCR measures the label as it stands for `max_text_length`, and what is left of it for SAR's two signs"
    sar = SARClasses('ab')
    assert sar_label('a'*23+'??', sar, 25)[1] == 23
    with pytest.raises(UserError, match='longer than 25'): ctc_label('a'*23+'???', sar.alphabet, 25)

def test_small_letters_may_be_more():
    "'İ' is two characters when small, and then a label that fitted no longer does"
    a = Alphabet('i\u0307')
    assert drop_unknown('İ', a, lower=True) == 'i\u0307' and refusal_reason('İ', 'i\u0307', 1) and ctc_label('İ', a, 2, lower=True)[1] == 2

@pytest.mark.parametrize('row,text', [([5,0,1,1,5,6,6],'abb'), ([0,1,5,0],'ab'), ([5,5,0],''), ([5,0,6,1],'ab'), ([5,4,5],'<UKN>'), ([6,6],''), ([0,1],'ab')])
def test_sar_classes_decode(row, text):
    sar = SARClasses('abcd')
    assert (sar.unknown, sar.start, sar.pad, len(sar)) == (4,5,6,7)
    for o in (row, np.array(row), torch.tensor(row)): assert sar.decode(o) == text

def test_keys_v1():
    a = Alphabet.from_file(KEYS, use_space_char=True)
    assert len(a) == 6625 and a.chars[:4] == ["'", '疗', '绚', '诚'] and a.chars[-3:] == ['紹', '懮', ' ']
    small = Alphabet('0aZ ')
    assert [a.chars[i-1] for i in small.columns_in(a)[1:]] == list('0aZ ')

def test_batch_is_padded_int64():
    labels,lengths = encode_batch(['ab', 'b'], Alphabet('abc'), 3)
    assert labels.dtype == lengths.dtype == torch.int64
    assert labels.tolist() == [[1,2,0],[2,0,0]] and lengths.tolist() == [2,1]

@pytest.mark.parametrize('text,says', [('abd', "character 'd' is not in the alphabet"), ('abcabc', r'\(6 characters\): longer than 5'), ('', 'empty')])
def test_bad_label_is_named(text, says):
    a = Alphabet('abc')
    with pytest.raises(UserError, match=says): encode_batch(['ab', text], a, 5)
    keep,why = usable_labels(['ab', text, text, 'cccca'], a, 5)
    assert keep == [0,3] and list(why.values()) == [2]

def test_length_is_inclusive(): assert encode_batch(['abcab'], Alphabet('abc'), 5)[1].item() == 5

def test_encode_names_the_character():
    with pytest.raises(UserError, match="'naïve': character 'ï'"): Alphabet('naive').encode('naïve')

def test_columns_in():
    student,teacher = Alphabet('cab'),Alphabet('xabyc')
    logits = torch.randn(2, 4, len(teacher))
    got = logits[..., student.columns_in(teacher)]
    assert torch.equal(got, logits[..., [0,5,2,3]])
    with pytest.raises(UserError, match='lacks 2 of these characters: xy'): teacher.columns_in(student)

def test_repeated_character_takes_the_last_class():
    a = Alphabet(' a ')
    assert a.encode(' ') == [3] and a.decode([1,2,3]) == ' a ' and Alphabet('a ').columns_in(a).tolist() == [0,2,3]

@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_from_file_keeps_what_cannot_be_seen(tmp_path, end):
    chars = [' ', 'a', '\u00ad', '\u2028', '\u3000']
    (tmp_path/'d.txt').write_bytes((end.join(chars)+end).encode())
    assert Alphabet.from_file(tmp_path/'d.txt').chars == chars

@pytest.mark.parametrize('content,says', [(None, 'No such file'), (b'a\n\xff\n', 'byte 2 is not UTF-8'), (b'', 'without characters'), (b'a\n\nb\n', 'line 2 of its file')])
def test_bad_file(tmp_path, content, says):
    f = tmp_path/'d.txt'
    if content is not None: f.write_bytes(content)
    with pytest.raises(UserError, match=says): Alphabet.from_file(f)

def tiny(path, n, props):
    io = [oh.make_tensor_value_info(o, tp.FLOAT, [1, None, n]) for o in 'xy']
    model = oh.make_model(oh.make_graph([oh.make_node('Identity', ['x'], ['y'])], 'tiny', io[:1], io[1:]))
    oh.set_model_props(model, props)
    onnx.save(model, path)
    return path

def test_from_onnx(tmp_path):
    chars = KEYS.read_text(encoding='utf-8').removesuffix('\n')
    a = Alphabet.from_onnx(tiny(tmp_path/'m.onnx', 6625, {'character': chars}))
    assert a.chars == Alphabet.from_file(KEYS, use_space_char=True).chars
    assert Alphabet.from_onnx(tiny(tmp_path/'n.onnx', 3, {'character': 'a\nb'})).chars == ['a','b']

@pytest.mark.parametrize('n,props,says', [(4, {'character': 'a'}, '1 characters, but 4 output classes'), (3, {}, 'no alphabet')])
def test_onnx_that_will_not_do(tmp_path, n, props, says):
    with pytest.raises(UserError, match=says): Alphabet.from_onnx(tiny(tmp_path/'m.onnx', n, props))

def test_broken_onnx(tmp_path):
    f = tiny(tmp_path/'m.onnx', 3, {'character': 'a\nb'})
    f.write_bytes(f.read_bytes()[:-7])
    with pytest.raises(UserError, match='not an ONNX file'): Alphabet.from_onnx(f)
    with pytest.raises(UserError, match='No such file'): Alphabet.from_onnx(tmp_path/'none.onnx')
