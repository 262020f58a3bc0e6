"""What it costs to make batches, beside the step that uses them: `python -m benchmarks.loaders [--rounds 5] [--steps 4] [--json FILE]`.

The transforms are those of configs/rec/ppocrv3_distillation.yml (words joined and augmented, 3x48x320) and configs/det/ppocrv3_cml.yml (pages
pasted, warped, cropped and drawn on, 3x960x960), on rendered words and pages that lie in files, JPEG and PNG by turns; pages have 1280x720 pixels,
as ICDAR 2015's.

How it was kept fair. One thread each for torch, OpenCV and matrix products. All ways of loading are run in turns, each round beginning with
another, and give the same batches. The first batch of an epoch, for which processes are started, is not counted. `kept` reads decoded pictures
from a memory-mapped file (`keep:` in a configuration). `operations` times each operation by itself. `--steps N` trains N steps of each configuration
at its smaller batch size with two workers, and says for how long the loop waited for batches."""
import argparse, os, tempfile, time
if __name__=='__main__': os.environ.update({f'{o}_NUM_THREADS': '1' for o in ('OMP','OPENBLAS','MKL')})
import json, logging
from pathlib import Path
from string import ascii_letters, digits
import cv2, numpy as np, torch
from fastai.callback.core import CancelFitException
from fastai.learner import Callback
from benchmarks.quickstart import machine
from distillbook.config import build_dl, build_learner, build_set, load_config
from distillbook.core import write_beside
from distillbook.det.render import render_page
from distillbook.rec.render import render_word
from distillbook.data.render import font_files, make_words

CONFIGS = Path(__file__).parents[1]/'configs'
CASES = dict(rec=('rec/ppocrv3_distillation.yml', (8,128)), det=('det/ppocrv3_cml.yml', (1,8)))


def make_words_files(folder, n):
    rows = []
    for i,w in enumerate(make_words(n, 0)):
        name = f'{i:04d}.{("jpg","png")[i%2]}'
        cv2.imwrite(str(folder/name), render_word(w, font_files('dejavu')[i%12], np.random.default_rng(i)))
        rows.append(f'{name}\t{w}')
    (folder/'list.txt').write_text('\n'.join(rows))


def make_page_files(folder, n):
    rows = []
    for i in range(n):
        rng,words = np.random.default_rng(i),make_words(400, 7)
        im,polys,texts = render_page(rng, 720, 1280, words, font_files('dejavu'), words_max=40, size=(14,44), tilt=6)
        name = f'{i:04d}.{("jpg","png")[i%2]}'
        cv2.imwrite(str(folder/name), im)
        label = [dict(points=np.asarray(p).tolist(), transcription=t) for p,t in zip(polys, texts)]
        rows.append(f'{name}\t{json.dumps(label)}')
    (folder/'list.txt').write_text('\n'.join(rows))


def config(kind, folder, bs, workers=0, *more):
    files = (f'dataset.data_dir={folder}', f'dataset.label_file_list=[{folder}/list.txt]', f'loader.num_workers={workers}')
    data = [f'{side}.{k}' for side in ('Train','Eval') for k in files]
    own = ['Global.use_gpu=false', f'Global.save_model_dir={folder}/out', f'Train.loader.batch_size_per_card={bs}']
    return load_config(CONFIGS/CASES[kind][0], [*data, *own, *more])


def seconds_a_batch(dl, epoch, most):
    dl.set_epoch(epoch)
    it = iter(dl)
    next(it)
    start,n = time.perf_counter(),0
    for _ in it:
        n += 1
        if n==most: break
    return (time.perf_counter()-start)/n


def spread(v): return [float(np.quantile(v, q)) for q in (.5,0,1)]


def loaders(kind, folder, rounds):
    out = {}
    for bs in CASES[kind][1]:
        kept = f'Train.dataset.keep={folder}/kept'
        ways = {'no worker': (0,), '1 worker': (1,), '2 workers': (2,), 'kept, no worker': (0,kept)}
        dls = {k: build_dl(config(kind, folder, bs, *w), 'Train') for k,w in ways.items()}
        took = {k: [] for k in ways}
        most = max(6, (48 if kind=='rec' else 12)//bs)
        for r in range(rounds):
            for k in np.roll(list(ways), r): took[k].append(seconds_a_batch(dls[k], r, most))
        base = np.array(took['no worker'])
        out[f'{kind}, batch of {bs}'] = {k: dict(seconds=spread(v), ratio=spread(np.array(v)/base)) for k,v in took.items()}
    return out


def operations(kind, folder, rounds, n=48):
    "Milliseconds that each operation takes for a sample"
    data = build_set(config(kind, folder, 1), 'Train')
    n,took = min(n, len(data)),{}
    for r in range(rounds):
        sums = {}
        for i in range(n):
            rng = np.random.default_rng([r, i])
            start = time.perf_counter()
            sample = data.source.read(i, rng)
            sums['read'] = sums.get('read', 0)+time.perf_counter()-start
            for op in data.ops:
                if hasattr(op, 'ext_data_num'):
                    sample = {**sample, 'ext_data': data._others(op.ext_data_num, rng, [])} # Read in the time of who looks
                start = time.perf_counter()
                sample = op(sample, rng)
                name = type(op).__name__
                sums[name] = sums.get(name, 0)+time.perf_counter()-start
        for k,v in sums.items(): took.setdefault(k, []).append(1000*v/n)
    return {k: spread(v) for k,v in took.items()}


def pictures(folder, kind, suffix, rounds):
    "Microseconds to read and decode a picture, and to read it from the file of pixels, copied"
    from distillbook.data.kept import keep_pictures
    from distillbook.data.lists import label_files
    from distillbook.data.operations import DecodeImage
    lines = [o for o in (folder/'list.txt').read_text().split('\n') if o.split('\t')[0].endswith(suffix)]
    (folder/f'{suffix}.txt').write_text('\n'.join(lines))
    source,op = label_files(folder/f'{suffix}.txt', folder),DecodeImage(img_mode='BGR')
    kept = keep_pictures(source, [op], folder/'kept')
    ways = dict(decoded=lambda i: op(source.read(i), None), kept=kept.read)
    took = {k: [] for k in ways}
    for r in range(rounds):
        for k in list(ways)[::(1,-1)[r%2]]:
            start = time.perf_counter()
            for i in range(len(source)): ways[k](i)['image'].copy()
            took[k].append(1e6*(time.perf_counter()-start)/len(source))
    files = sum((folder/o.split('\t')[0]).stat().st_size for o in lines)
    sizes = [files/len(lines), kept.path.stat().st_size/len(lines)]
    return {**{k: spread(v) for k,v in took.items()}, 'ratio': spread(np.array(took['kept'])/took['decoded']), 'bytes': sizes}


class Clock(Callback):
    "When batches come and steps end, as far as `most` steps after the first"
    def __init__(self, most): self.most,self.came,self.ended = most,[],[]
    def before_batch(self): self.came.append(time.perf_counter())
    def after_batch(self):
        self.ended.append(time.perf_counter())
        if len(self.ended)>self.most: raise CancelFitException()


def waits(kind, folder, steps, workers=2):
    "Seconds from step to step of the learner, and of these in waiting for the batch, while processes read ahead"
    bs,clock,chars = CASES[kind][1][0],Clock(steps),folder/'characters.txt'
    chars.write_text('\n'.join([*ascii_letters, *digits, *map(chr, range(0x4e00, 0x4e00+6561))]))
    own = [f'Global.character_dict_path={chars}'] if kind=='rec' else []
    cfg = config(kind, folder, bs, workers, *own)
    for m in cfg['Architecture']['Models'].values(): m['pretrained'] = None
    learn = build_learner(cfg)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=clock)
    wait,step = np.subtract(clock.came[1:], clock.ended[:-1]),np.diff(clock.ended)
    return dict(batch=bs, steps=steps, workers=workers, wait=spread(wait), step=spread(step), share=float(wait.sum()/step.sum()))


def told(values, scale=1, form='.2f'):
    "Median, least and most"
    middle,least,most = (f'{scale*v:{form}}' for v in values)
    return f'{middle} ({least.strip()} to {most.strip()})'


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--steps', type=int, default=0)
    ap.add_argument('--words', type=int, default=1200)
    ap.add_argument('--pages', type=int, default=64)
    ap.add_argument('--only', choices=[*CASES])
    ap.add_argument('--json', type=Path)
    a = ap.parse_args()
    if a.words<256 or a.pages<16: ap.error('two batches are wanted of each size: --words 256 and --pages 16 at least')
    torch.set_num_threads(1); cv2.setNumThreads(1)
    logging.getLogger('distillbook').setLevel(logging.ERROR)
    res = dict(machine=machine(), cores=os.cpu_count(), threads=1, rounds=a.rounds, loaders={}, operations={}, pictures={}, waits={})
    with tempfile.TemporaryDirectory() as d:
        for kind in [a.only] if a.only else CASES:
            folder = Path(d)/kind
            folder.mkdir()
            (make_words_files if kind=='rec' else make_page_files)(folder, a.words if kind=='rec' else a.pages)
            print(f'\n{kind}: milliseconds a batch, median (least to most of {a.rounds} rounds); ratio to no worker')
            for name,ways in loaders(kind, folder, a.rounds).items():
                res['loaders'][name] = ways
                for k,v in ways.items(): print(f"  {name:20} {k:16} {told(v['seconds'], 1e3, '8.1f')}   {told(v['ratio'])}")
            res['operations'][kind] = ops = operations(kind, folder, a.rounds)
            print('  milliseconds a sample: ' + ', '.join(f'{k} {v[0]:.2f}' for k,v in ops.items()))
            for suffix in ('png','jpg'):
                res['pictures'][f'{kind} {suffix}'] = o = pictures(folder, kind, suffix, a.rounds)
                print(f"  {suffix}: decoded {o['decoded'][0]:.0f} us, kept {o['kept'][0]:.0f} us, ratio {told(o['ratio'])}; "
                    f"{o['bytes'][0]/1e3:.1f} kB in the file, {o['bytes'][1]/1e3:.1f} kB of pixels")
            if a.steps:
                res['waits'][kind] = w = waits(kind, folder, a.steps)
                print(f"  two workers, batch of {w['batch']}: a step takes {w['step'][0]:.2f} s, of which {1e3*w['wait'][0]:.1f} ms "
                    f"of waiting for its batch; {100*w['share']:.2f} % over {a.steps} steps")
    if a.json:
        with write_beside(a.json) as tmp: tmp.write_text(json.dumps(res, indent=1))


if __name__=='__main__': main()
