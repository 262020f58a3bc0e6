"""Is every file trained? `python tools/every_file.py FOLDER [--only PATTERN] [--out FILE.json]`: each YAML file under a folder is trained for an epoch of two or three steps and measured.

For instance PaddleOCR's `configs`, called in PaddleOCR's folder so that its dictionaries are found. A file stays as it is but for paths, the batch, the number of epochs and workers; frozen teachers
without weights teach as chance made them. Networks and pictures have their full size; where that takes more than `--seconds` of a core, crops are smaller and the row says so. Each file has a process of its own.
What came of it is written at once, and what is written and went well is not done again. (Linux and macOS.)"""
import json, math, os, random, re, resource, shutil, signal, sys, tempfile, time, warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2, numpy as np, torch
from fastcore.script import call_parse
from benchmarks.quickstart import machine
from distillbook.cli import app
from distillbook.config.checker import missing_files, weights_wanted
from distillbook.config.data import eval_sides
from distillbook.config.files import read_config
from distillbook.config.networks import characters, task
from distillbook.core import UserError, write_beside
from distillbook.data.render import draw_line, font_files
from distillbook.det.render import page_label, texture, write_pages
from distillbook.use.training import read_metrics
import distillbook.config.assembly, distillbook.use.report, distillbook.use.given # What is forked from here has everything already

ORDER = 'v4','v5','v6','SVTR','v3','v2'
SETTINGS = 'paths; 2 lines or 1 page a batch (MultiScaleSampler.first_bs too); epoch_num 1; num_workers 0; one thread; no GPU; pretrained_model and checkpoints left out; pages are measured at 320 pixels'
SMALLER = dict(EastRandomCropData=dict(size=[320,320]), RandomCrop=dict(size=[320,320]), DetResizeForTest=dict(limit_side_len=320, limit_type='max', resize_long=None, image_shape=None))


# %% data
def lines(folder, chars):
    "Four lines of a dictionary's characters; what a font lacks, it draws as a box"
    rng,fonts = random.Random(0),font_files('dejavu')
    good = [c for c in chars if len(c)==1 and c.isprintable() and not c.isspace()]
    texts = [''.join(rng.choices(good, k=rng.randint(4, 8))) for _ in range(4)]
    for i,t in enumerate(texts): cv2.imwrite(str(folder/f'{i}.png'), 255-draw_line(t, fonts[i]))
    (folder/'label.txt').write_text(''.join(f'{i}.png\t{t}\n' for i,t in enumerate(texts)), encoding='utf-8')

def pages(folder): write_pages(folder, 2, height=640, width=640, words_max=20)

def ring(centre, radius, thick, start, sweep, n=7):
    "A piece of a ring as a polygon of 2n points: the outer arc, then the inner one back"
    def arc(r): return [[centre[0]+r*math.cos(a), centre[1]+r*math.sin(a)] for a in np.radians(np.linspace(start, start+sweep, n))]
    return arc(radius+thick/2)+arc(radius-thick/2)[::-1]

def seals(folder):
    "Two round seals with writing along their edges"
    (folder/'images').mkdir()
    rows,font = [],font_files('dejavu')[0]
    for i in range(2):
        image = np.clip(texture(np.random.default_rng(i), 640, 640), 0, 255).astype(np.uint8)
        places = [((200+240*k, 200+220*k), 130) for k in range(2)]
        polys = [ring(c, r, 44, start, 140) for c,r in places for start in (190, 10)]
        for c,r in places:
            cv2.circle(image, c, r+36, (40,40,200), 5)
            for a in range(195, 470, 20):
                letter = cv2.resize(255-draw_line('ABCDEFGHKLMNPRST'[a//20%16], font), (28,36))
                M = cv2.getRotationMatrix2D((14,18), -a-90, 1)
                M[:,2] += np.array(c)+r*np.array([math.cos(math.radians(a)), math.sin(math.radians(a))])-(14,18)
                ink = cv2.warpAffine(255-letter, M, (640,640))>128
                image[ink] = 40,40,200
        cv2.imwrite(str(folder/f'images/{i}.png'), image)
        rows.append(f'images/{i}.png\t{page_label(polys, ["SEAL"]*len(polys))}\n')
    (folder/'label.txt').write_text(''.join(rows))

def data_for(config, folder):
    "The data that a file wants, made once; what else has to be said for it"
    if task(config)=='det':
        kind,make,also = ('seals',seals,[]) if config['Train']['dataset'].get('name')=='TextDetDataset' else ('pages',pages,[])
    else:
        try: chars,also = characters(config),[]
        except UserError: chars,also = characters({}),['Global.character_dict_path=']
        kind,make = f"lines_{Path(str(config['Global'].get('character_dict_path'))).stem if not also else 'plain'}",lambda d: lines(d, chars)
    if not (folder/kind/'label.txt').exists():
        (folder/kind).mkdir(exist_ok=True)
        make(folder/kind)
    return folder/kind,also


# %% what is said differently
def section(config, side):
    for key in side: config = config[key]
    return config

def overrides(config, data, run):
    "For every file: where the data is, how little of it, and no more than one thread"
    found = ['Global.use_gpu=false', 'Global.threads=1', 'Global.epoch_num=1', 'Global.print_batch_step=1', f'Global.save_model_dir={run}', 'Global.checkpoints=', 'Global.pretrained_model=']
    batch = 2 if task(config)=='rec' else 1
    for side in (('Train',), *eval_sides(config).values()):
        key = '.'.join(side)
        found += [f'{key}.dataset.data_dir={data}', f'{key}.dataset.label_file_list=[{data}/label.txt]', f'{key}.loader.num_workers=0', f'{key}.loader.batch_size_per_card={batch}']
        if 'ratio_list' in section(config, side)['dataset']: found.append(f'{key}.dataset.ratio_list=[1.0]')
        if 'sampler' in section(config, side): found.append(f'{key}.sampler.first_bs={batch}')
        if side[0]=='Eval': found += smaller(config, side)
    return found

def without_weights(config):
    "Weights that nobody here has: frozen teachers teach as chance made them, the others begin anew"
    wanted = weights_wanted(config)
    others = [k for k in missing_files(config) if k.startswith('Architecture.Models.') and k.split('.')[2] not in wanted]
    return [*(f'Architecture.Models.{n}.pretrained=none' for n in wanted), *(f'{k}=' for k in others)]

def smaller(config, side):
    "Crops of 320 pixels, or pages of at most so many"
    rows = section(config, side)['dataset']['transforms']
    return [f"{'.'.join(side)}.dataset.transforms.{i}={json.dumps({name: {**(row[name] or {}), **SMALLER[name]}})}" for i,row in enumerate(rows) for name in row if name in SMALLER]


# %% one file
def forked(path, given, run, seconds):
    "Train in a process of its own: its status ('too long' if it had to be ended), what it said, seconds of a core, megabytes at most"
    said,latest = run.with_suffix('.txt'),time.time()+10*seconds
    if not (pid := os.fork()):
        status = 1
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds+5))
            sys.stdout = sys.stderr = open(said, 'w', buffering=1, encoding='utf-8')
            for fd in (1,2): os.dup2(sys.stdout.fileno(), fd)
            app(['train', '-c', str(path), *(o for v in given for o in ('-o', v))])
            status = 0
        except SystemExit as e: status = e.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        if time.time()>latest: os.killpg(pid, signal.SIGXCPU)
        time.sleep(.1)
    code,usage = os.waitstatus_to_exitcode(ended[1]),ended[2]
    unit = 1e6 if sys.platform=='darwin' else 1e3
    return 'too long' if code==-signal.SIGXCPU else code, said.read_text(errors='replace'), round(usage.ru_utime+usage.ru_stime, 1), round(usage.ru_maxrss/unit)

def why(said):
    "The one line that an ended training leaves, or the last of a trace"
    rows = [l.strip() for l in said.splitlines() if l.strip()]
    return next((l.removeprefix('distillbook: ') for l in rows[::-1] if l.startswith('distillbook: ')), rows[-1] if rows else 'nothing was said')[:400]

def try_file(path, work, seconds):
    "The row of a file"
    config = read_config(path)
    data,also = data_for(config, work)
    also += without_weights(read_config(path, [*also, 'Global.checkpoints=', 'Global.pretrained_model=']))
    run = work/'run'
    for more in ([], smaller(config, ('Train',))):
        shutil.rmtree(run, ignore_errors=True)
        given = [*overrides(config, data, run), *also, *more]
        status,said,took,most = forked(path, given, run, seconds)
        if status!='too long': break
    row = dict(ok=status==0, core_seconds=took, peak_mb=most, also=[*also, *(['crops of 320 pixels'] if more else [])])
    if status!=0: return {**row, 'why': f'more than {seconds} seconds of a core' if status=='too long' else why(said), 'trace': 'Traceback' in said}
    rows,summary = read_metrics(run/'metrics.csv'),json.loads((run/'summary.json').read_text())
    learned = sum(n['parameters'] for n in summary['networks'].values() if not n['frozen'])
    loss = rows[-1].get('loss')
    return {**row, 'steps': rows[-1]['step'], 'loss': loss, 'finite': loss is not None and math.isfinite(loss), 'parameters': learned, 'measured': summary['best'] is not None}

def in_order(folder):
    "The files by generation, and which say what an earlier one says, but for names in Global: these come last"
    names = sorted((p.relative_to(folder).as_posix() for p in folder.rglob('*.y*ml')), key=lambda n: (next((i for i,o in enumerate(ORDER) if re.search(o, n)), len(ORDER)), n))
    first,same = {},{}
    for name in names:
        config = read_config(folder/name)
        counts = {**config, 'Global': {k: v for k,v in config['Global'].items() if k in ('character_dict_path','max_text_length','use_space_char','use_amp','use_ema')}}
        known = first.setdefault(json.dumps(counts, sort_keys=True, default=str), name)
        if known!=name: same[name] = known
    return [*first.values(), *same], same

@call_parse
def main(
    folder:str, # Where the files are
    only:str='', # A regular expression: files whose path it is found in, even if they are done
    seconds:int=150, # Of a core, after which a file is tried with smaller crops, and then given up
    out:str=None, # A JSON file for the rows, gone on with if it is there
):
    "Train each file of a folder for an epoch"
    warnings.simplefilter('ignore')
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    folder,out = Path(folder),Path(out) if out else None
    names,same = in_order(folder)
    known = json.loads(out.read_text())['files'] if out and out.exists() else {}
    rows = {k: v for k,v in known.items() if k in names}
    def keep():
        told = dict(command=f"python tools/every_file.py PaddleOCR's configs --seconds {seconds}", machine=machine(), settings=SETTINGS, files={k: rows[k] for k in names if k in rows}, same=same)
        with write_beside(out) as tmp: tmp.write_text(json.dumps(told, indent=1, ensure_ascii=False)+'\n')
    with tempfile.TemporaryDirectory() as d:
        for name in names:
            if not re.search(only, name) or not only and rows.get(name, {}).get('ok'): continue
            try: rows[name] = try_file(folder/name, Path(d), seconds)
            except UserError as e: rows[name] = dict(ok=False, why=str(e), trace=False)
            r = rows[name]
            print(f"ok  {name}: {r['steps']} steps, loss {r['loss']:.4g}, {r['core_seconds']} s of a core, {r['peak_mb']} MB {r['also'] or ''}" if r['ok'] else f"NO  {name}: {r['why']}", flush=True)
            if out: keep()
    if out: keep()
    asked = {k: r for k,r in rows.items() if re.search(only, k)}
    alike = [k for k in same if k not in asked and asked.get(same[k], {}).get('ok')]
    print(f"{sum(r['ok'] for r in asked.values())} of {len(asked)} trained; {len(alike)} more say what one of these says, but for names")
    sys.exit(any(not r['ok'] for r in asked.values()))
