"Whatever is wrong with a configuration, a label file, a picture or a file of weights: one line that says so, and never a traceback"
import copy, io, json, logging, os, pickle, shutil, signal, struct, zipfile
from pathlib import Path
import cv2, numpy as np, pytest, torch, yaml
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from typer.testing import CliRunner
from distillbook import cli
from distillbook.checkpoint import load_file
from distillbook.cli import app
from distillbook.config import build_decoder, build_loss, build_metric, build_model, build_set, files as config_files, load_config
from distillbook.config.data import build_operation
from distillbook.config.optimizer import build_optimizer, lr_schedule
from distillbook.config.registry import OPERATIONS
from distillbook.config.values import Section
from distillbook.core import UserError
from distillbook.rec.render import read_image
from distillbook.use.weights import extract, load_weights, read_pickle, read_weights, save_weights
from distillbook.data.render import draw_line, font_files

CONFIGS = Path(__file__).parents[1]/'configs'
SLOW = 40 # Seconds that no input may take

def fuzz(n): return settings(derandomize=True, deadline=None, database=None, max_examples=n, suppress_health_check=list(HealthCheck))


# %% what is fine, and what is not
class Endless(BaseException): pass

def in_time(f):
    "The result of `f`, or `Endless`"
    def stop(*_): raise Endless(f'more than {SLOW} s')
    was = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try: return f()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, was)

def ran(*args):
    "Status and last line of a command that ends well, or with one line for its user"
    r = in_time(lambda: CliRunner().invoke(app, [str(o) for o in args]))
    if r.exit_code==0 and r.exception is None: return 0,''
    assert isinstance(r.exception, SystemExit), f'{args}: {r.exception!r}'
    lines = r.stderr.strip().splitlines()
    said = [l for l in lines if l.startswith('distillbook: ')]
    assert r.exit_code in (2,130) and (len(said)==1 and lines[-1]==said[0] and len(said[0])<1300 or 'Usage:' in r.stderr), f'{args}: status {r.exit_code}: {r.stderr[-2000:]}'
    return r.exit_code,lines[-1]

def told(f):
    "The message of the `UserError` that `f` ends in; '' if it ends well"
    try: in_time(f)
    except UserError as e:
        assert '\n' not in str(e) and 3<len(str(e))<1100, str(e)
        return str(e)
    return ''

def refused(*args, says=''):
    status,line = ran(*args)
    assert status==2 and says in line, line


@pytest.mark.parametrize('fault', [KeyError('lr'), RuntimeError('shapes'), RecursionError(), AttributeError('bar'), AssertionError()])
def test_a_planted_traceback_is_caught(fault, home, monkeypatch):
    def load_config(*_): raise fault
    monkeypatch.setattr(config_files, 'load_config', load_config)
    with pytest.raises(AssertionError, match=type(fault).__name__): ran('train', '-c', home/'rec.yml')
    with pytest.raises(type(fault)): told(load_config)

def test_a_planted_message_is_caught(home, monkeypatch):
    for message in ('two\nlines', 'x'*5000):
        monkeypatch.setattr(cli, 'one_line', lambda o: message)
        with pytest.raises(AssertionError): ran('train', '-c', home/'none.yml')
    def load_config(*_): raise SystemExit(1)
    monkeypatch.setattr(config_files, 'load_config', load_config)
    with pytest.raises(AssertionError, match='status 1'): ran('train', '-c', home/'rec.yml')

def test_an_endless_run_is_caught(monkeypatch):
    monkeypatch.setitem(globals(), 'SLOW', .05)
    def forever():
        while True: pass
    with pytest.raises(Endless): told(forever)


# %% what is mangled
@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with lines, pages, a small configuration of each kind, and a run of two of them; what the command changes in the process is put back"
    d,was,log,threads = tmp_path_factory.mktemp('fuzz'),os.getcwd(),logging.getLogger('distillbook'),torch.get_num_threads()
    kept = log.handlers,log.level,log.propagate
    os.chdir(d)
    torch.set_num_threads(1)
    _lines(d)
    _pages(d)
    for n,tree in dict(rec=_rec(d), det=_det(d), quick=_quick(d)).items(): (d/f'{n}.yml').write_text(yaml.safe_dump(tree, sort_keys=False))
    for n in ('rec','det'): assert ran('train', '-c', d/f'{n}.yml')==(0,'')
    yield d
    os.chdir(was)
    torch.set_num_threads(threads)
    log.handlers,log.level,log.propagate = kept

@pytest.fixture(autouse=True)
def one_thread(home):
    yield
    torch.set_num_threads(1)

def _lines(d):
    (d/'lines').mkdir()
    for i in range(6): cv2.imwrite(str(d/'lines'/f'{i}.png'), 255-draw_line(f'word{i}', font_files('dejavu')[0]))
    for name,n in dict(train=6, val=2).items(): (d/'lines'/f'{name}.txt').write_text(''.join(f'{i}.png\tword{i}\n' for i in range(n)))

def _pages(d):
    (d/'pages').mkdir()
    rows = []
    for i in range(2):
        im = np.full((96,96,3), 255, np.uint8)
        for y in (10,50): im[y:y+30,10:70] = np.dstack([255-draw_line('ab', font_files('dejavu')[0])[10:40,:60]]*3) if i else 0
        cv2.imwrite(str(d/'pages'/f'{i}.png'), im)
        rows.append(f"{i}.png\t{json.dumps([dict(transcription='ab', points=[[10,y],[70,y],[70,y+30],[10,y+30]]) for y in (10,50)])}\n")
    (d/'pages'/'train.txt').write_text(''.join(rows))
    (d/'pages'/'val.txt').write_text(rows[0])

def _sides(cfg, d, what, sizes):
    cfg['Global'].update(use_gpu=False, epoch_num=1, print_batch_step=1, save_model_dir=str(d/'runs'/what))
    for side,name in (('Train','train'),('Eval','val')):
        cfg[side]['dataset'].update(data_dir=str(d/what), label_file_list=[str(d/what/f'{name}.txt')])
        cfg[side]['loader'].update(num_workers=0, batch_size_per_card=2)
        for op in cfg[side]['dataset']['transforms']:
            for k,v in sizes.items():
                if k in op: op[k] = v
    return cfg

def _plain(path): return json.loads(json.dumps(load_config(path)))

def _rec(d):
    cfg = _plain(CONFIGS/'rec'/'ppocrv3_distillation.yml')
    cfg['Global'].update(character_dict_path=None)
    for m in cfg['Architecture']['Models'].values():
        m['Backbone']['scale'] = .125
        m['Head']['head_list'] = [dict(CTCHead=dict(Neck=dict(name='svtr', dims=8, depth=1, hidden_dims=16, use_guide=True), Head=dict(fc_decay=1e-5))), dict(SARHead=dict(enc_dim=16, d_k=16, max_text_length=25))]
    return _sides(cfg, d, 'lines', dict(RecResizeImg=dict(image_shape=[3,48,64])))

def _det(d):
    cfg = _plain(CONFIGS/'det'/'ppocrv3_cml.yml')
    for m in cfg['Architecture']['Models'].values():
        m.update(Backbone=dict(name='MobileNetV3', scale=.35, model_name='small', disable_se=True), Neck=dict(name='RSEFPN', out_channels=32, shortcut=True), Head=dict(name='DBHead', k=50))
    cfg['Architecture']['Models']['Teacher']['pretrained'] = 'none'
    return _sides(cfg, d, 'pages', dict(EastRandomCropData=dict(size=[64,64], max_tries=5, keep_ratio=True), DetResizeForTest=dict(limit_side_len=64)))

def _quick(d):
    "The README's configuration, tiny; it has a released teacher, terms, two evaluation sets and what takes the teacher's place"
    cfg = _plain(CONFIGS/'quickstart.yml')
    cfg['Global'].update(save_model_dir=str(d/'runs'/'quick'), epoch_num=1, threads=1, print_batch_step=1, eval_batch_step=[0,2], character_dict_path=str(CONFIGS/'rec'/'digits_and_letters.txt'))
    del cfg['Eval']['held_out']
    for part in (cfg, cfg['WithoutTeacher']):
        for m in part['Architecture']['Models'].values():
            if 'Backbone' in m: m['Backbone']['channels'] = [8,8,8,8]
    for part in (cfg['Train'], *cfg['Eval'].values()):
        part['dataset']['words'],part['loader']['batch_size_per_card'] = 16 if part is cfg['Train'] else 4,8
        if 'skip' in part['dataset']: part['dataset']['skip'] = 20
    return cfg


# %% configurations
ODD = [None, True, False, 0, 1, -1, 2, 7, 10**12, -10**18, 10**30, .5, 1e-9, 1e300, float('nan'), float('inf'), -float('inf'), '', 'a', ' ', '\t', '\0', 'x\ny', '1e-3', 'NaN', '☃é漢字', 'a'*3000, '%s {} {0} [bold]', 'Student', 'nowhere/at/all',
    '/dev/null', '..', [], {}, [None], [[]], [1], [48,64], [1,2,3,4], ['a','b'], [{}], {'a': 1}, {1: 2}, {None: None}, {'name': 'x'}, [{'a': {'b': [1]}}], b'\x00\xff', {1,2}]
CHANGES = [lambda o: [o], lambda o: [o,o], lambda o: {'a': o}, str, lambda o: o*2 if isinstance(o, (int,float,str,list)) else o, lambda o: -o if isinstance(o, (int,float)) else o, lambda o: o+1 if isinstance(o, (int,float)) else o, lambda o: o*10**20 if isinstance(o, (int,float)) else o]
LONG = 'epoch_num num_workers words skip depth ext_data_num max_tries'.split() # Large numbers here are a legitimate wish that takes long, and sections without them are as long as their defaults

def places(o, path=()):
    if path: yield path
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*path,k))

def at(o, path):
    for k in path: o = o[k]
    return o

def mangled(data, tree):
    "A copy with a value replaced, changed, exchanged, dropped or given another name"
    cfg,spots = copy.deepcopy(tree),list(places(tree))
    *path,last = data.draw(st.sampled_from(spots))
    node,how = at(cfg, path),data.draw(st.sampled_from(['odd','odd','odd','change','other','drop','rename']))
    if how=='odd': node[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
    if how=='change': node[last] = data.draw(st.sampled_from(CHANGES))(node[last])
    if how=='other': node[last] = copy.deepcopy(at(tree, data.draw(st.sampled_from(spots))))
    if how=='rename' and isinstance(node, dict): node[data.draw(st.sampled_from(['x', 1, None, True, '', f'{last}s']))] = node.pop(last)
    if how=='drop': del node[last]
    assume(not any(p[-1] in LONG and isinstance(v := at(cfg, p), (int,float)) and v>100 for p in places(cfg)))
    return cfg

@pytest.mark.parametrize('which,n', [('rec',25), ('det',15)])
def test_mangled_configurations(which, n, home):
    tree = yaml.safe_load((home/f'{which}.yml').read_text())
    ends = []
    @fuzz(n)
    @given(st.data())
    def check(data):
        (home/'m.yml').write_text(yaml.dump(mangled(data, tree), sort_keys=False, allow_unicode=True))
        ends.append(ran('train', '-c', home/'m.yml')[0])
    check()
    assert 0 in ends and 2 in ends

def test_mangled_quickstarts(home):
    tree = yaml.safe_load((home/'quick.yml').read_text())
    ends = []
    def has_words(cfg):
        "A set of words that does not say how many has ten thousand, which is fine and takes long"
        sides = [cfg.get('Train'), *(cfg['Eval'].values() if isinstance(cfg.get('Eval'), dict) else ())]
        return all('words' in o['dataset'] for o in sides if isinstance(o, dict) and isinstance(o.get('dataset'), dict))
    @fuzz(20)
    @given(st.data())
    def check(data):
        cfg = mangled(data, tree)
        assume(has_words(cfg))
        (home/'m.yml').write_text(yaml.dump(cfg, sort_keys=False, allow_unicode=True))
        ends.append(ran('train', '-c', home/'m.yml')[0])
    check()
    assert 0 in ends and 2 in ends

@pytest.mark.parametrize('which', ['rec','det','quick'])
def test_mangled_configurations_in_pieces(which, home):
    "Many more of them, as far as terms, decoder, metric, optimiser and schedule, which is quick"
    tree = yaml.safe_load((home/f'{which}.yml').read_text())
    @fuzz(150)
    @given(st.data())
    def check(data):
        (home/'m.yml').write_text(yaml.dump(mangled(data, tree), sort_keys=False, allow_unicode=True))
        try: cfg = load_config(home/'m.yml')
        except UserError: return
        for build in (build_loss, build_decoder, build_metric): told(lambda: build(cfg))
        optimizer = Section(cfg).maybe('Optimizer') if isinstance(cfg.get('Optimizer'), dict) else {}
        told(lambda: build_optimizer(optimizer))
        told(lambda: lr_schedule(cfg['Optimizer'].get('lr') if optimizer else None, 3, 4)(5))
    check()

FOUND = [ # Each of these was once a traceback: which configuration, what was changed, and what is said now
    ('rec', 'Train.dataset.transforms.1.RecConAug.prob={a: 0.5}', 'RecConAug.prob: a number is wanted'), ('rec', 'Train.dataset.transforms.1.RecConAug.image_shape={a: 1}', 'RecConAug.image_shape: a list is wanted'),
    ('rec', 'Train.dataset.transforms.0={RecResizeImg: {image_shape: [3, 48, 64]}}', 'RecResizeImg fails; are the operations in the right order?'), ('rec', 'Eval.dataset.transforms.0.DecodeImage.channel_first=true', 'none of 2 lines'),
    ('rec', 'Metric.key=', 'Metric.key: whose acc'), ('rec', 'PostProcess.name=CTCLabelDecode', 'take DistillationCTCLabelDecode'), ('rec', 'PostProcess.name=DistillationDBPostProcess', 'no decoder'), ('rec', 'Metric.base_metric_name=DetMetric', "no metric 'DetMetric'"),
    ('rec', 'Architecture.Models.Student.Backbone.last_pool_kernel_size=[true, 2]', ''), ('rec', 'Architecture.Models.Student.Backbone.last_conv_stride=[1000000000000000000000000000000, 2]', ''),
    ('rec', 'Architecture.Models.Teacher.Head.head_list.0.CTCHead.Head.fc_decay=1.0e+300', 'CTCHead.Head.fc_decay: a number is wanted'), ('rec', 'Optimizer.regularizer.factor=1.0e+300', 'Optimizer.regularizer.factor'), ('det', 'Optimizer.lr=', 'Optimizer.lr'),
    ('rec', 'Train.dataset.ext_op_transform_idx=.nan', 'ext_op_transform_idx: a whole number'), ('rec', 'Train.dataset.label_file_list=5', 'a list of files is wanted'), ('rec', 'Train.dataset.delimiter=5', 'delimiter'), ('rec', 'Train.dataset.seed=x', 'dataset.seed'),
    ('det', 'Eval.dataset.transforms.3.NormalizeImage.order=chw', 'NormalizeImage fails'), ('det', 'Architecture.Models.Student.Neck.out_channels=8', "network 'Student' fails on a batch"),
    ('quick', 'Architecture.Models.Student.Backbone.channels=[8, 8, 8, a]', 'Student.Backbone'), ('quick', 'Architecture.Models.Student.Backbone.channels=[8, 0, 8, 8]', 'Student.Backbone'), ('quick', 'Architecture.Models.Student.Backbone.channels=[8, 1000000000000000000000000000000, 8, 8]', 'Student.Backbone'),
    ('quick', 'Global.seed=-1', 'Global.seed'), ('quick', 'Optimizer.lr=.inf', 'Optimizer.lr'), ('quick', 'Optimizer.lr.max_lr=.inf', 'Optimizer.lr.max_lr'), ('quick', 'Loss.loss_config_list.1.Term.on=[]', 'Term'), ('quick', 'Loss.loss_config_list.1.Term.on=[Student]', 'kd'), ('quick', 'Loss.loss_config_list.1.Term.loss=..', 'Term.loss'),
    ('quick', 'Loss.loss_config_list.1.Term.weight={name: Cosine}', 'weight'), ('quick', 'Loss.loss_config_list.1.Term.T=hot', 'Term.T'), ('quick', 'Loss.loss_config_list.1.Term.targets=[labl]', 'labl'), ('quick', 'Architecture.Models.Twin.init=Twin', 'Twin.init'), ('quick', 'Train.dataset.fonts=5', 'fonts'), ('quick', 'Train.dataset.noise=5', 'noise'),
    ('quick', 'Train.dataset.height=1000000000000', 'height'), ('quick', 'Train.dataset.characters=5', 'characters'), ('quick', 'Eval={watched: 5}', 'Eval.watched'), ('quick', 'WithoutTeacher=5', 'WithoutTeacher'), ('quick', 'WithoutTeacher.Loss.name=CombinedLos', 'CombinedLoss'), ('quick', 'Architecture.Models.Teacher.cache=5', 'Teacher.cache'),
    ('quick', 'Global.save_model_dir="a\\0b"', 'a zero character'), ('rec', 'Loss.loss_config_list.²=1', "'²'"),
    ('rec', 'Global.seed=2020-99-99', 'month'), ('rec', f"Global.seed={'1'*6000}", 'digits'), ('quick', f"Global.seed={'['*5000}", 'brackets'), ('rec', f"Train.dataset.data_dir={'a'*3000}", 'there is no aaa'),
]

@pytest.mark.parametrize('i', range(len(FOUND)), ids=lambda i: f'{FOUND[i][0]} {FOUND[i][1][:70]}')
def test_found(i, home):
    which,change,says = FOUND[i]
    refused('train', '-c', home/f'{which}.yml', '-o', change, says=says)


def bomb(n):
    names = 'abcdefghijklmnopq'[:n]
    return 'a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n' + ''.join(f"{b}: &{b} [{', '.join([f'*{a}']*8)}]\n" for a,b in zip(names, names[1:]))

HOSTILE = dict(brackets='Global: '+'['*2000, deep='Global: '+'['*500+']'*500, deeper='\n'.join(' '*i+'a:' for i in range(2000)), bomb=bomb(12), bomb_in_use=f'{bomb(12)}Global: *l\nPostProcess: *l\n', itself='Global: &a {b: *a}\nPostProcess: 1', itself_again='Global: &a\n  seed: *a',
    call='Global: !!python/object/apply:os.system ["touch pwned"]', binary='Global: !!binary "abc"', tag='Global: !x 1', listed_key='? [a, b]\n: c', digits='Global: {seed: '+'1'*6000+'}', date='Global: {seed: 2020-99-99}', zero='Global: {save_model_dir: "a\\0b"}', null='Global: \0', tab='Global:\n\tseed: 1',
    two='Global: {seed: 1}\n---\nGlobal: {seed: 2}', merge='Global:\n  <<: [1,2]\n', number='5', list='- 1', keys='null: 1\ntrue: 2\n3: 4', surrogate='Global: "\\ud800"', escape='Global: "\\x1b[31m"', many='\n'.join(f'k{i}: 1' for i in range(5000)), wide='Global: {seed: '+'x'*10**5+'}', set='Global: !!set {a, b}', omap='Global: !!omap [a: 1]')

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_yaml(name, home):
    (home/'m.yml').write_text(HOSTILE[name])
    assert told(lambda: load_config(home/'m.yml')) and not (home/'pwned').exists()
    (home/'m.yml').write_text((home/'rec.yml').read_text()+HOSTILE[name])
    told(lambda: load_config(home/'m.yml'))

PIECES = [b':', b'-', b'&a ', b'*a', b'[', b'{', b'}', b']', b'"', b"'", b'\n', b'\n  ', b' ', b'!', b'|', b'>', b'#', b'\t', b'%', b'\xff', b'\0', b'null', b'<<: ', b'1e999', b'\xef\xbb\xbf', b'?']

def spoilt(data, whole, pieces=()):
    "Bytes with a part dropped, changed, repeated or put in"
    b = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        i,n = data.draw(st.integers(0, len(b))),data.draw(st.sampled_from([1,1,2,8,64,len(b)]))
        how = data.draw(st.sampled_from(['drop','flip','again','put','end']))
        if how=='drop': del b[i:i+n]
        if how=='flip' and i<len(b): b[i] ^= 1<<data.draw(st.integers(0, 7))
        if how=='again': b[i:i] = b[:n]
        if how=='put': b[i:i] = data.draw(st.sampled_from(pieces) if pieces else st.binary(max_size=16))
        if how=='end': del b[i:]
    return bytes(b)

@pytest.mark.parametrize('which', ['rec','det','quick'])
def test_spoilt_yaml(which, home):
    whole = (home/f'{which}.yml').read_bytes()
    @fuzz(40)
    @given(st.data())
    def check(data):
        (home/'m.yml').write_bytes(spoilt(data, whole, PIECES))
        told(lambda: load_config(home/'m.yml'))
    check()

@fuzz(40)
@given(path=st.lists(st.sampled_from(['Global','Architecture','Models','Student','Loss','loss_config_list','0','-1','99999999999999999999','٣','Train','dataset','transforms','lr','Optimizer','','x','seed','channels']), min_size=1, max_size=5),
       value=st.one_of(st.text(max_size=12), st.sampled_from(['', '[', '{a: 1}', '&a [*a]', '!!python/x', '2020-99-99', '.nan', '.inf', '1e999', 'null', "'", '- 1', '? [a]\n: b', '*a', '"\\0"'])), eq=st.sampled_from(['=','=','=','','==']))
def test_odd_overrides(path, value, eq, home):
    for which in ('rec','quick'): told(lambda: load_config(home/f'{which}.yml', [f"{'.'.join(path)}{eq}{value}"]))


# %% lines, pages, pictures
def png(im): return cv2.imencode('.png', im)[1].tobytes()

def picture(): return np.random.default_rng(0).integers(0, 255, (20,60,3), np.uint8)

PICTURES = dict(empty=b'', text=b'hello', zeros=bytes(1000), head=png(picture())[:30], half=png(picture())[:2000], flipped=bytes([*png(picture())[:60], 77, *png(picture())[61:]]), one=png(np.zeros((1,1,3), np.uint8)), wide=png(np.zeros((1,3000,3), np.uint8)), wider=png(np.zeros((1,60000), np.uint8)),
    tall=png(np.zeros((3000,1,3), np.uint8)), sixteen=png(np.zeros((20,60), np.uint16)), alpha=png(np.zeros((20,60,4), np.uint8)), nan=cv2.imencode('.tiff', np.full((20,60), np.nan, np.float32))[1].tobytes(), svg=b'<svg xmlns="http://www.w3.org/2000/svg"/>', gif=b'GIF89a'+bytes(20),
    huge=b'\x89PNG\r\n\x1a\n'+struct.pack('>I', 13)+b'IHDR'+struct.pack('>IIBBBBB', 100000, 100000, 8, 2, 0, 0, 0)+bytes(4))

@pytest.fixture(scope='module')
def pictures(home):
    (home/'odd').mkdir()
    for k,v in PICTURES.items(): (home/'odd'/f'{k}.png').write_bytes(v)
    (home/'odd'/'folder.png').mkdir()
    os.symlink('nowhere', home/'odd'/'link.png')
    os.symlink('loop.png', home/'odd'/'loop.png')
    return home/'odd'

@pytest.mark.parametrize('name', [*PICTURES, 'folder', 'link', 'loop', 'none', '[', '*/'])
def test_odd_pictures_are_read_or_refused(name, home, pictures):
    for run in ('lines',) if name in ('wide','wider','tall') else ('lines','pages'): # A page of 3000 to 1 is made 64 pixels high, and takes long
        status,_ = ran('predict', '--run', home/'runs'/run, pictures/f'{name}.png')
    assert (status==0)==(name in ('one','wide','wider','tall','sixteen','alpha')) or name in ('flipped','half','nan')

@fuzz(60)
@given(data=st.data())
def test_spoilt_pictures(data, home):
    (home/'s.png').write_bytes(spoilt(data, png(picture())))
    told(lambda: read_image(home/'s.png', grow=True))

def label_file(home, which, rows):
    (home/'labels.txt').write_bytes(rows)
    cfg = yaml.safe_load((home/f'{which}.yml').read_text())
    for side in ('Train','Eval'): cfg[side]['dataset']['label_file_list'] = [str(home/'labels.txt')]
    (home/'m.yml').write_text(yaml.safe_dump(cfg, sort_keys=False))
    return home/'m.yml'

LABELS = dict(empty=b'', newlines=b'\n\n\n', tab=b'\t\n', tabs=b'\t\t\t\n'*3, binary=bytes(range(256))*9, utf16='1.png\tb\n'.encode('utf-16'), latin='1.png\té\n'.encode('latin1')*4, zero=b'1\0.png\tx\n'*4, no_path=b'\tabc\n'*4, no_text=b'1.png\t\n'*4, spaces=b'1.png abc\n'*4, json=b'["1.png"\tabc\n'*4,
    numbers=b'[1,2]\tabc\n'*4, nested=b'['*5000+b'\tabc\n', long_text=b'1.png\t'+b'a'*5000+b'\n', long_path=b'a'*5000+b'\tabc\n', folder=b'.\tabc\n'*4, elsewhere=b'../../../../../../etc/passwd\tabc\n'*4, emoji='1.png\t😀\n'.encode()*4)

@pytest.mark.parametrize('name', LABELS)
def test_odd_label_files(name, home): refused('train', '-c', label_file(home, 'rec', LABELS[name]))

def test_odd_pictures_in_training(home, pictures):
    rows = ''.join(f'{o}\tabc\n' for o in sorted(pictures.iterdir()))+''.join(f'{i}.png\tword{i}\n' for i in range(6))
    path = label_file(home, 'rec', rows.encode())
    certain = '{tia_prob: 1, crop_prob: 1, reverse_prob: 1, noise_prob: 1, jitter_prob: 1, blur_prob: 1, hsv_aug_prob: 1}'
    assert ran('train', '-c', path, '-o', f'Train.dataset.transforms.2.RecAug={certain}', 'Train.dataset.transforms.1.RecConAug.prob=1', 'Train.loader.buckets=true')==(0,'')

BOX = [[10,10],[70,10],[70,40],[10,40]]
WORDS = dict(null='null', number='5', text='"abc"', dict='{}', inner='[1, 2]', no_points='[{"transcription": "a"}]', no_text=json.dumps([dict(points=BOX)]), deep='['*20000, digits='1'*5000, half=json.dumps([dict(points=BOX, transcription='a')])[:-5],
    infinite='[{"points": [[Infinity,1],[NaN,2],[3,4],[1,1]], "transcription": "a"}]', **{k: json.dumps([dict(points=v, transcription='a')]) for k,v in dict(one=[[1,1]], five=5, word='abc', nothing=None, ragged=[[1],[1,2],[3,4]], three=[[1,2,3]]*4, far=[[1e300,1],[2,2],[3,4e300],[5,5]], digit=[['1','2']]*4, nest=[[[1,2]]*4]).items()})

@pytest.mark.parametrize('name', WORDS)
def test_odd_words_of_pages(name, home): refused('train', '-c', label_file(home, 'det', ''.join(f'{i}.png\t{WORDS[name]}\n' for i in range(2)).encode()))

@pytest.mark.parametrize('points', [[[5,5]]*4, [[0,0],[10,0],[20,0],[30,0]], [[0,0],[50,50],[50,0],[0,50]], [[-1e6,-1e6],[1e6,-1e6],[1e6,1e6],[-1e6,1e6]], [[.1,.1],[.2,.1],[.2,.2],[.1,.2]], [[10**30,1],[2,2],[3,4],[5,5]]])
def test_odd_polygons(points, home): ran('train', '-c', label_file(home, 'det', ''.join(f"{i}.png\t{json.dumps([dict(points=points, transcription='a'), dict(points=BOX, transcription='a')])}\n" for i in range(2)).encode()))

@pytest.mark.parametrize('which', ['rec','det'])
def test_spoilt_label_files(which, home):
    whole = (home/('lines' if which=='rec' else 'pages')/'train.txt').read_bytes()
    cfg = load_config(label_file(home, which, whole))
    @fuzz(40)
    @given(st.data())
    def check(data):
        (home/'labels.txt').write_bytes(spoilt(data, whole, [b'\t', b'\n', b'\r', b'[', b'{', b'"', b'\0', b'\xff', b'../', b'NaN', b'1e999']))
        def read():
            lines = build_set(cfg, 'Eval')
            for i in range(len(lines)): told(lambda: lines[i])
        told(read)
    check()

SETTINGS = 'img_mode channel_first prob image_shape max_text_length ext_data_num tia_prob noise_prob padding eval_mode shrink_ratio limit_side_len size scale mean order augmenter_args total_epoch use_shrink brightness x'.split()

@fuzz(300)
@given(name=st.sampled_from(sorted(OPERATIONS)), settings=st.dictionaries(st.sampled_from(SETTINGS), st.sampled_from([o for o in ODD if not isinstance(o, (bytes,set))]), max_size=2))
def test_odd_settings_of_operations(name, settings): told(lambda: build_operation(Section(dict(here={name: settings}), 'here', name), name, dict(max_text_length=25)))


# %% weights
@pytest.fixture(scope='module')
def model(home): return build_model(load_config(home/'rec.yml'))

@pytest.fixture(scope='module')
def files(home, model):
    "Weights of the model and of one of its networks, in each kind of file"
    (home/'weights').mkdir()
    for s in ('pth','pdparams','safetensors'):
        save_weights(model, home/'weights'/f'model.{s}')
        save_weights(model['Student'], home/'weights'/f'net.{s}')
    return sorted((home/'weights').iterdir())

def state(net): return {k: v.clone() for k,v in net.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) or v.isnan().any() for k,v in a.items())

def uses(model, path):
    "Whatever reads weights tells, and a network that does not get all is as it was"
    before = state(model)
    if told(lambda: load_weights(model, path)) : assert same(before, state(model)), path
    model.load_state_dict(before)
    for f in (lambda: load_weights(model['Student'], path), lambda: load_weights(model, path, strict=False), lambda: extract(path, 'Student'), lambda: read_weights(path), lambda: read_pickle(path), lambda: load_file(path)): told(f)
    model.load_state_dict(before)

@pytest.mark.parametrize('i', range(6))
def test_spoilt_weights(i, model, files):
    whole,path = files[i].read_bytes(),files[i].with_name(f'spoilt{files[i].suffix}')
    @fuzz(6)
    @given(st.data())
    def check(data):
        path.write_bytes(spoilt(data, whole))
        uses(model, path)
    check()
    path.unlink()

class Evil:
    def __reduce__(self): return os.system, ('touch pwned',)

def saved(o):
    b = io.BytesIO()
    torch.save(o, b)
    return b.getvalue()

def zipped():
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z: z.writestr('a.txt', 'x')
    return b.getvalue()

def header(s, n=4): return struct.pack('<Q', len(s))+s.encode()+bytes(n)

PICKLES = dict(evil=pickle.dumps(dict(a=Evil())), eval=b"cbuiltins\neval\n(S'open(\"pwned\",\"w\")'\ntR.", list=pickle.dumps([]), none=pickle.dumps(None), number=pickle.dumps(5), keys=pickle.dumps({1: np.zeros(2)}), objects=pickle.dumps(dict(a=np.array(['x',None], dtype=object)), 2), texts=pickle.dumps(dict(a=np.array(['x'])), 2),
    dates=pickle.dumps(dict(a=np.zeros((2,2), 'M8[s]')), 2), complex=pickle.dumps(dict(a=np.zeros(2, complex)), 2), itself=b'\x80\x04]\x94h\x00a.', deep=b'\x80\x04'+b']'*100000+b'a'*99999+b'.', long=b'\x80\x04\x8e\xff\xff\xff\xff\x0f\x00\x00\x00', slices=pickle.dumps({'UnpackBigParamInfor@@': dict(w=dict(slices=['a'], OriginShape=[10**12])), 'a': np.zeros(2)}, 2),
    slices_too=pickle.dumps({'UnpackBigParamInfor@@': 5, 'a': np.zeros(2)}, 2), empty=b'', stop=b'.', text=b'no weights at all', zeros=bytes(1000), zip=zipped(), zip_head=b'PK\x03\x04'+bytes(100))
SAFE = dict(nothing=struct.pack('<Q', 0), long=struct.pack('<Q', 1<<62)+b'{}', half=header('{"a":', 0), large=header('{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'), kind=header('{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}'), negative=header('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'))

@pytest.mark.parametrize('suffix', ['pdparams','pth','safetensors','onnx','weights'])
def test_odd_files_of_weights(suffix, home, model):
    for name,b in {**PICKLES, **SAFE}.items():
        path = home/f'{name}.{suffix}'
        path.write_bytes(b)
        uses(model, path)
        path.unlink()
    assert not (home/'pwned').exists()

def test_odd_checkpoints(home, model):
    net = model['Student']
    def each(f): return {k: f(v) for k,v in net.state_dict().items()}
    T = torch.zeros(2)
    odd = dict(evil=dict(a=Evil()), list=[1,2], none=None, number=5, tensor=T, pair=(T,T), keys={1: T}, deep=dict(model=dict(model=T)), no_model=dict(model=5), nothing={}, texts=each(lambda v: 'x'), dots={'..': T, '': T, '.': T}, line={'é\n\x1b': T}, module=net, sparse=each(lambda v: v.to_sparse() if v.ndim else v), meta=each(lambda v: v.to('meta')),
        quantised=dict(a=torch.quantize_per_tensor(torch.rand(3), .1, 0, torch.qint8)), half=each(lambda v: v.half() if v.is_floating_point() else v))
    for name,o in odd.items():
        (home/'odd.pth').write_bytes(saved(o))
        uses(model, home/'odd.pth')
        for k in ('Architecture.Models.Student.pretrained',) if name =='half' else ('Global.checkpoints',):
            status,_ = ran('train', '-c', home/'rec.yml', '-o', f"{k}={home/'odd.pth'}")
            assert (status==0)==(name =='half'), (name, k)
    assert not (home/'pwned').exists()

@pytest.mark.parametrize('name', ['latest','best_accuracy'])
def test_spoilt_runs(name, home):
    "A run goes on from a whole state, or says that it cannot; what it has is what it had"
    whole,path = (home/'runs'/'lines'/f'{name}.pth').read_bytes(),home/'spoilt'/f'{name}.pth'
    path.parent.mkdir(exist_ok=True)
    (path.parent/'config.yml').write_text((home/'runs'/'lines'/'config.yml').read_text())
    @fuzz(3)
    @given(st.data())
    def check(data):
        path.write_bytes(spoilt(data, whole))
        ran('train', '-c', home/'rec.yml', '-o', f'Global.checkpoints={path}', 'Global.epoch_num=2', f"Global.save_model_dir={home/'runs'/'again'}")
        ran('eval', '--run', path.parent)
        ran('predict', '--run', path.parent, home/'lines'/'1.png')
    check()


# %% runs, and what else the command does with them
SPOILS = {'config.yml': [b'', b'- 1', bytes(range(256)), b'a: '+b'['*500, b'a: 2020-99-99', b'Global: {}\nPostProcess: 5\nMetric: 5\nArchitecture: 5'], 'best_accuracy.pth': [b'', saved([1]), saved({'a': 1}), saved(dict(model={}, metrics=5, net=3)), None],
    'train.log': [b'', bytes(range(256)), b'[2026/01/01 00:00:00] epoch: [1/1], global_step: x, lr: nan, loss: a, acc:\ncur metric, acc: x\nbest metric, acc: \n', None],
    'metrics.csv': [b'', bytes(range(256)), b'a,b\n1\n2,3,4\n', b'step,epoch,acc\nx,y,z\n', b'step\n1.5\n', b'step,epoch,acc\n1,1,nan\n', None], 'summary.json': [b'', b'[1, 2]', None]}

@pytest.mark.parametrize('name,i', [(k,i) for k,v in SPOILS.items() for i in range(len(v))])
def test_odd_runs(name, i, home):
    run = home/'spoilt_run'
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(home/'runs'/'lines', run)
    (run/name).unlink() if SPOILS[name][i] is None else (run/name).write_bytes(SPOILS[name][i])
    reads = [['eval','--run',run], ['predict','--run',run,home/'lines'/'1.png'], ['extract',run,'-o',home/'x.pdparams']]
    looks = [['summary','--run',run], ['compare',run,home/'runs'/'pages']]
    fails = [ran(*o)[0]==2 for o in {'config.yml': reads+looks, 'best_accuracy.pth': reads}.get(name, [*looks[1:], [*looks[1], '--draw', home/'x.png']])]
    assert any(fails) or name not in ('config.yml','best_accuracy.pth') or SPOILS[name][i] is None # without its best state a run has the latest

def test_odd_metrics_in_a_checkpoint(home):
    run = home/'spoilt_run'
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(home/'runs'/'lines', run)
    whole = load_file(run/'best_accuracy.pth')
    for odd in (5, {'a': 'x', 'acc': .5}):
        (run/'best_accuracy.pth').write_bytes(saved({**whole, 'metrics': odd}))
        assert ran('export', '--run', run, '--out', home/'x')==(0,'')

def test_odd_quickstart_runs(home):
    "A run with a teacher that is in no file, and with answers that are kept"
    run = home/'first'
    assert ran('train', '-c', home/'quick.yml', '-o', f'Global.save_model_dir={run}')==(0,'')
    whole = {n: (run/n).read_bytes() for n in ('config.yml','best_accuracy.pth','latest.pth','answers/PP-OCRv3_rec.bin')}
    state = load_file(run/'best_accuracy.pth')
    frozen = [saved({**state, 'frozen': o}) for o in (5, ['Teacher'], {'Teacher': 5}, {'Student': 'x'}, {'Nobody': 'x'}, {})]
    odd = {'config.yml': [b''], 'best_accuracy.pth': [saved([1]), saved({'a': 1}), *frozen], 'latest.pth': [saved([1])], 'answers/PP-OCRv3_rec.bin': [b'', whole['answers/PP-OCRv3_rec.bin'][:-9]]}
    for name in whole:
        for o in (bytes(range(256)), *odd[name]):
            (run/name).write_bytes(o)
            for command in (['eval','--run',run], ['predict','--run',run,home/'lines'/'1.png'], ['extract',run,'-o',home/'x.pth'], ['compare',run]): ran(*command)
            if name=='latest.pth': refused('train', '-c', home/'quick.yml', '-o', f'Global.checkpoints={run}/latest', f'Global.save_model_dir={home}/again')
        (run/name).write_bytes(whole[name])
    assert ran('eval', '--run', run)==(0,'')

TRAINED = 'Global.pretrained_model=runs/lines/best_accuracy'
COMMANDS = [ # What is asked for, and what is said
    ('extract none -o x.pth', 'none'), ('extract runs/lines -o x', '.safetensors'), ('extract runs/lines --net Studnt -o x.pth', "'Student'"), ('extract lines/1.png -o x.pth', '1.png'), ('extract runs/lines -o x.pdparams -c lines', 'lines'),
    ('export --run runs/lines --net x --out x', "'x'"), ('export --run runs/lines --net , --out x', ''), ('export --run runs/lines --to y', "'y'"), ('export --run runs/lines --out lines/1.png', '1.png'), ('export', 'wanted'), ('export -c rec.yml --out x', 'which weights'),
    ('read none.png', 'none.png'), ('read lines/1.png --det none.onnx', 'none.onnx'), ('read lines/1.png --rec lines/1.png', '1.png'), ('compare none', 'none'), ('compare lines', 'config.yml'), ('compare runs/lines --draw x.gif', 'x.gif'),
    ('render x -o y', "'x'"), ('render rec -o lines -n 2 --val 1', 'lines'), ('render rec -o lines/1.png -n 2 --val 1', '1.png'), ('render rec -o y --fonts z -n 2 --val 1', "'z'"), ('lr-find', 'wanted'), ('lr-find -c rec.yml -o Optimizer.lr=', 'Optimizer.lr'), ('summary -c rec.yml --draw x', 'x'), ('summary -c rec.yml -o Loss.loss_config_list.0={}', 'loss_config_list'),
    ('eval -c rec.yml', 'which weights'), ('eval -c rec.yml --run runs/lines', 'wanted'), ('predict --run runs/lines', 'which pictures'), ('train -c lines', 'lines'),
    *[(f'predict -c rec.yml lines/1.png -o {TRAINED} Eval.dataset.transforms.2.RecResizeImg={o}', 'RecResizeImg') for o in ('5','{"image_shape":5}','{"image_shape":[3,0,9]}')],
    (f'eval -c rec.yml -o {TRAINED} Eval.dataset.transforms.2.RecResizeImg.image_shape=[3,16,30]', "network 'Teacher'"), (f'eval -c rec.yml -o {TRAINED} Eval.dataset.transforms.3.KeepKeys.keep_keys=[image]', 'do not fit together'),
    ('predict -c det.yml pages/1.png -o Global.pretrained_model=runs/pages/best_accuracy Eval.dataset.transforms=[]', '1.png'), ('eval -c det.yml -o Global.pretrained_model=runs/pages/best_accuracy Eval.dataset.transforms.5.KeepKeys.keep_keys=[image]', ''),
]

@pytest.mark.parametrize('i', range(len(COMMANDS)), ids=lambda i: COMMANDS[i][0][-60:])
def test_odd_commands(i, home):
    before = sorted(home.rglob('x*'))
    refused(*COMMANDS[i][0].split(), says=COMMANDS[i][1])
    assert [o for o in sorted(home.rglob('x*')) if o not in before and o.is_file()]==[]
