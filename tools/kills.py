"""A hundred SIGKILLs: `python tools/kills.py --kills 100 --terms 20`. Small trainings are killed at any moment, go on from what they left, and are killed again.

Each chain has to end as the same training that nobody touched: states, best states, kept answers, tables and pictures equal to the bit. SIGTERM goes to all processes of a training, as
`timeout` sends it: it ends with status 130, its state saved. What is not as it should be is told, with how to repeat it, and the status is 1. (Linux and macOS.)"""
import json, os, random, shutil, signal, sys, tempfile, time, warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests')]

import cv2, numpy as np, torch, yaml
from fastcore.script import call_parse
from benchmarks.quickstart import machine
from distillbook.cache import Answers
from distillbook.checkpoint import load_file
from distillbook.cli import app
from distillbook.config import load_config
from distillbook.data.lists import label_files
from distillbook.data.shards import write_shards
from distillbook.rec.labels import Alphabet, read_characters
from distillbook.use.export import export_onnx
import distillbook.config.assembly, distillbook.use.report, distillbook.use.given # A training forked from here has everything already
import hostile

LINES,EPOCHS = 10,2 # Batches of two: 10 steps, each measured and saved


# %% trainings
def lines(d, **loader):
    "Two students of each other on lines that are drawn anew each time"
    cfg = hostile.config(d)
    cfg['Global'].update(epoch_num=EPOCHS, print_batch_step=2, eval_batch_step=[0,1])
    ops = cfg['Train']['dataset']['transforms']
    cfg['Train'] = dict(dataset={**cfg['Train']['dataset'], 'transforms': [ops[0], dict(RecAug=dict(aug_prob=.8)), *ops[1:]]}, loader=dict(shuffle=True, batch_size_per_card=2, num_workers=0, **loader))
    return cfg

def processes(d):
    "The same, read by two processes, from pictures that are kept"
    cfg = lines(d)
    cfg['Train']['loader']['num_workers'] = 2
    cfg['Train']['dataset']['keep'] = 'kept'
    return cfg

def shards(d):
    "From tar files, by one process"
    cfg = lines(d)
    cfg['Train']['loader']['num_workers'] = 1
    cfg['Train']['dataset'] = {k: v for k,v in cfg['Train']['dataset'].items() if k=='transforms'} | dict(name='WebDataset', data_dir=str(d/'shards'), label_file_list=['*.tar'])
    return cfg

def teacher(d):
    "A student of a teacher that is in no checkpoint, and whose answers are kept"
    cfg = hostile.config(d)
    cfg['Global'].update(epoch_num=EPOCHS, print_batch_step=2, eval_batch_step=[0,1])
    cfg['Train']['loader'] = dict(shuffle=True, batch_size_per_card=2, num_workers=0)
    cfg['Architecture']['Models'] = dict(Teacher=dict(pretrained=str(d/'teacher.onnx'), freeze_params=True, cache=True), Student=hostile.NET)
    cfg['Loss']['loss_config_list'] = [dict(DistillationCTCLoss=dict(weight=1., model_name_list=['Student'], key='head_out')), dict(Term=dict(loss='kd', on=['Student.head_out','Teacher.head_out.ctc']))]
    cfg['PostProcess']['model_name'] = ['Student','Teacher']
    return cfg

def pages(d):
    "Two small detectors and their teacher"
    cfg = json.loads(json.dumps(load_config('det/ppocrv3_cml')))
    cfg['Global'].update(use_gpu=False, epoch_num=EPOCHS, print_batch_step=2, eval_batch_step=[0,1], threads=1)
    for m in cfg['Architecture']['Models'].values(): m.update(Backbone=dict(name='MobileNetV3', scale=.35, model_name='small', disable_se=True), Neck=dict(name='RSEFPN', out_channels=32, shortcut=True), Head=dict(name='DBHead', k=50))
    cfg['Architecture']['Models']['Teacher']['pretrained'] = 'none'
    sizes = dict(EastRandomCropData=dict(size=[64,64], max_tries=5, keep_ratio=True), DetResizeForTest=dict(limit_side_len=64))
    for side in ('Train','Eval'):
        cfg[side]['dataset'].update(data_dir=str(d/'pages'), label_file_list=[str(d/'pages/train.txt')], ratio_list=1.)
        cfg[side]['loader'].update(num_workers=0, batch_size_per_card=2)
        cfg[side]['dataset']['transforms'] = [{k: sizes.get(k, v) for k,v in op.items()} for op in cfg[side]['dataset']['transforms']]
    cfg['Eval']['loader']['batch_size_per_card'] = 1
    return cfg

KINDS = {f.__name__: f for f in (lines, processes, shards, teacher, pages)}

def prepare(d):
    "Data, a teacher, and a configuration of each kind"
    rng = np.random.default_rng(0)
    for name in ('lines','pages'): (d/name).mkdir()
    for i in range(LINES): cv2.imwrite(str(d/f'lines/{i}.png'), rng.integers(0, 255, (24,60,3), np.uint8))
    for i in range(6): cv2.imwrite(str(d/f'pages/{i}.png'), rng.integers(0, 255, (96,96,3), np.uint8))
    (d/'lines/train.txt').write_text(''.join(f'{i}.png\ta{i}\n' for i in range(LINES)))
    words = [dict(transcription='ab', points=[[10,10],[70,10],[70,40],[10,40]]), dict(transcription='c', points=[[10,50],[70,50],[70,80],[10,80]])]
    (d/'pages/train.txt').write_text(''.join(f'{i}.png\t{json.dumps(words)}\n' for i in range(6)))
    write_shards(label_files(d/'lines/train.txt', d/'lines'), d/'shards', per=4)
    from distillbook.config.networks import build_networks
    alone = hostile.config(d)
    (d/'alone.yml').write_text(yaml.safe_dump(alone))
    torch.manual_seed(0)
    export_onnx(build_networks(load_config(d/'alone.yml'))['Student'].eval(), d/'teacher.onnx', 'rec', Alphabet(read_characters()))
    for name,make in KINDS.items(): (d/f'{name}.yml').write_text(yaml.safe_dump(make(d), sort_keys=False))


# %% processes
def start(d, kind, run):
    "A training in a process of its own, which goes on where the folder's state is; its number"
    args = ['train', '-c', str(d/f'{kind}.yml'), '-o', f'Global.save_model_dir={run}']
    if (run/'latest.pth').exists(): args.append(f'Global.checkpoints={run}/latest')
    if pid := os.fork(): return pid
    status = 1
    try:
        os.setsid()
        out = os.open(d/'said.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd in (1,2): os.dup2(out, fd)
        app(args)
    except SystemExit as e: status = e.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

def ended(pid, seconds=300):
    "The status of a process, which is ended if it takes longer"
    end = time.time()+seconds
    while time.time()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 'endless'

def nobody_left(pid, seconds=20):
    "Have the processes that read for a training ended too?"
    end = time.time()+seconds
    while time.time()<end:
        try: os.killpg(pid, 0)
        except ProcessLookupError: return True
        time.sleep(.05)
    return False

def moment(rng, run, pid, seconds):
    "Wait for a moment anywhere in a training, or in the midst of the writing of a file"
    before,end = set(run.glob('.*')),time.time()+rng.uniform(0, seconds)
    aimed = rng.random()<.4
    while time.time()<end: time.sleep(min(.005, max(0, end-time.time())))
    while aimed and time.time()<end+seconds and not set(run.glob('.*'))-before: time.sleep(.0002)
    if aimed: time.sleep(rng.uniform(0, .004))


# %% what comes of it
def same(a, b):
    "Where two nested things differ, or ''"
    if type(a)!=type(b): return f': {type(a).__name__}, {type(b).__name__}'
    if isinstance(a, dict) and a.keys()!=b.keys(): return f': keys {[*a]}, {[*b]}'
    if isinstance(a, list) and len(a)!=len(b): return f': {len(a)} and {len(b)} long'
    if isinstance(a, (dict,list)):
        found = ((k, same(a[k], b[k])) for k in (a if isinstance(a, dict) else range(len(a))))
        return next((f'.{k}{why}' for k,why in found if why), '')
    equal = a.dtype==b.dtype and a.shape==b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a==b or (a!=a and b!=b)
    return '' if equal else f': {str(a)[:60]}, {str(b)[:60]}'

def lasting(o):
    "Without clocks, and without what is another where a run goes on"
    if isinstance(o, dict): return {k: lasting(v) for k,v in o.items() if k not in ('seconds','ms_per_image','fps','save_model_dir','weights','checkpoints')}
    return [*map(lasting, o)] if isinstance(o, list) else o

def table(run): return [','.join(l.split(',')[:-1]) for l in (run/'metrics.csv').read_text().splitlines()]
def answers(run): return {p.name: {k.hex(): {n: torch.tensor(v) for n,v in (o.get(k) or {}).items()} for k in o.offsets} for p in run.glob('answers/*.bin') for o in [Answers(p, json.loads(p.read_bytes().split(b'\n')[0].removeprefix(Answers.mark))['about'])]}

PUT_ASIDE = 'earlier_best_accuracy.pth', # Of a training that was killed between its first best state and its first last one, and so begins anew

def difference(whole, run):
    "What of a run is not as in the one that nobody touched, or ''"
    files = [{p.relative_to(r).as_posix() for p in r.rglob('*') if p.is_file() and not p.name.startswith('.') and p.name not in PUT_ASIDE} for r in (whole,run)]
    if files[0]!=files[1]: return f'files: {sorted(files[0]^files[1])}'
    for name in sorted(n for n in files[0] if n.endswith('.pth')):
        if why := same(*(lasting(load_file(r/name)) for r in (whole,run))): return f'{name}{why}'
    for name,read in dict(table=table, answers=answers, summary=lambda r: lasting(json.loads((r/'summary.json').read_text())), config=lambda r: lasting(yaml.safe_load((r/'config.yml').read_text()))).items():
        if why := same(read(whole), read(run)): return f'{name}{why}'
    return next((n for n in sorted(files[0]) if n.endswith('.png') and (whole/n).read_bytes()!=(run/n).read_bytes()), '')

def where_it_was(run):
    "What a training was about when it was ended"
    if not (run/'train.log').exists(): return 'before the log'
    if not (run/'latest.pth').exists(): return 'before the first state'
    state = load_file(run/'latest.pth')
    if (run/'summary.json').exists(): return 'after the end'
    return 'training' if state['batch'] is not None or state['epoch']+1<EPOCHS else 'measuring and drawing at the end'


# %% chains
def chain(d, kind, rng, sig, seconds, most):
    "A training that is ended up to `most` times, and goes on each time: (where each one was, '' or what is wrong)"
    run,found,planned = d/'cut',[],min(most, rng.randint(3, 8))
    shutil.rmtree(run, ignore_errors=True)
    while True:
        pid,left = start(d, kind, run),set(run.glob('.*'))
        last = len(found)>=planned
        if not last:
            moment(rng, run, pid, seconds)
            try: os.kill(pid, sig) if sig==signal.SIGKILL else os.killpg(pid, sig)
            except ProcessLookupError: pass
        status,said = ended(pid),(d/'said.txt').read_text(errors='replace') if (d/'said.txt').exists() else ''
        if not nobody_left(pid): return found,f'processes are left behind by one that ended with {status}'
        if 'Traceback' in said and sig!=signal.SIGKILL or status=='endless': return found,f'{status}: {said[-600:]}'
        if status==0: return found,difference(d/'whole'/kind, run)
        stopped = status==130 and 'stopped by SIGTERM' in said and (run/'latest.pth').exists()
        if last or (status!=-sig and not stopped): return found,f'status {status}: {said[-600:]}'
        found.append('writing a file' if set(run.glob('.*'))-left else where_it_was(run))

@call_parse
def main(
    kills:int=100, # SIGKILLs, of the training process alone
    terms:int=20, # SIGTERMs, of it and of those that read for it
    seed:int=0, # Of the moments
    kind:str=None, # Only this one
    out:str=None, # A file for what was found, JSON
):
    "End trainings at random moments"
    warnings.simplefilter('ignore')
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    names,counts,faults,begun = [kind] if kind else list(KINDS),{},[],time.time()
    with tempfile.TemporaryDirectory() as folder:
        d = Path(folder)
        os.chdir(d)
        prepare(d)
        lasts = {}
        for name in names:
            start_at = time.time()
            status = ended(start(d, name, d/'whole'/name))
            assert status==0, (name, (d/'said.txt').read_text()[-2000:])
            lasts[name] = time.time()-start_at
            print(f'{name}: {lasts[name]:.1f} s if nobody touches it', flush=True)
        for sig,total in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
            done,i = Counter(),0
            while done.total()<total:
                name = names[i%len(names)] if sig==signal.SIGKILL or kind else ('processes','shards')[i%2]
                found,why = chain(d, name, random.Random(f'{seed} {sig.name} {i}'), sig, lasts[name], total-done.total())
                row = counts.setdefault(sig.name, {}).setdefault(name, dict(chains=0, ended=0, where={}))
                row['chains'],row['ended'],i = row['chains']+1,row['ended']+len(found),i+1
                for o in found: row['where'][o] = row['where'].get(o, 0)+1
                done.update(found)
                print(f"{sig.name} {name}: {', '.join(found) or 'not once'}: {why or 'equal to the bit'}", flush=True)
                if why: faults.append(f'{sig.name}, {name}, chain {i}, --seed {seed}: {why}')
        os.chdir('/')
    command = ' '.join(['python tools/kills.py', *sys.argv[1:]])
    res = dict(command=command, machine=machine(), seconds=round(time.time()-begun), ended={k: sum(o['ended'] for o in v.values()) for k,v in counts.items()}, trainings=counts, faults=faults)
    if out: Path(ROOT/out).write_text(json.dumps(res, indent=1)+'\n')
    print(f"{res['ended']}, {len(faults)} chains that did not end as they should")
    sys.exit(bool(faults))
