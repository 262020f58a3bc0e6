"""What `configs/det/finetune.yml` makes of a released detector with a few pages of one kind: better at others of it, and at other kinds no worse?

    python -m benchmarks.finetune_det [--data FOLDER] [--kinds thermal faint ...] [--train thermal] [--pages 15] [--seeds 0 1 2] [-o KEY=VALUE ...]

FOLDER/KIND/train.txt and test.txt are label files, their pictures beside them. Without --data worn pages are made: lines of a receipt, printed by a
tired till (thermal), folded, or grey on grey (faint). Of the pages a fifth is put aside to choose the best state, as a user would do. Each run is the
whole command, and its numbers are written when it ends; a run whose numbers are there is not run again. At the end `finetune_det.json` is written
beside them; copied to `benchmarks/results`, it is what the chapter shows. With --grid nothing is trained: what `box_thresh` and `unclip_ratio` of
`PostProcess` do to the released detector is written to `grid.json`."""
import argparse, json, random, sys, time
from pathlib import Path
import cv2, numpy as np, torch
from benchmarks.finetune import chosen, first, kept, table
from benchmarks.quickstart import machine
from distillbook.config import load_config
from distillbook.config.assembly import experiment, ready_networks
from distillbook.config.data import build_dl
from distillbook.config.evaluation import build_metric, decoder_of
from distillbook.core import write_beside
from distillbook.data.render import font_files
from distillbook.det.render import page_label, small_word
from distillbook.rec.worn import faint, folded, receipt_text, thermal
from distillbook.use.evaluation import at_rest, evaluate
from distillbook.use.training import model_of, train

KINDS = dict(thermal=thermal, folded=folded, faint=faint)

def worn_page(kind, rng, fonts, height=640, width=480):
    "A till's receipt: a picture uint8 [h,w,3], the corners of its lines and their texts"
    page,polys,texts = np.full((height,width), 255, np.uint8),[],[]
    y,texts_rng = int(rng.integers(10, 40)),random.Random(int(rng.integers(2**32)))
    font,em = fonts[rng.integers(len(fonts))],rng.uniform(12, 22)
    while True:
        text = receipt_text(texts_rng)
        ink = small_word(text, font, em*rng.choice([1, 1, 1, 1.4]))
        if y+ink.shape[0]>height-10: break
        if ink.shape[1]>width-20: continue
        (h,w),x = ink.shape,int(rng.integers(8, width-ink.shape[1]-8))
        page[y:y+h,x:x+w] = 255-ink
        polys.append([[x,y], [x+w,y], [x+w,y+h], [x,y+h]])
        texts.append(text)
        y += round(h+em*rng.uniform(.35, 1.2))
    lean = cv2.getRotationMatrix2D((width/2, height/2), rng.uniform(-3, 3), 1)
    page = cv2.warpAffine(page, lean, (width, height), borderValue=255)
    polys = np.float32(polys)@lean[:,:2].T.astype(np.float32) + lean[:,2].astype(np.float32)
    return cv2.cvtColor(KINDS[kind](page, rng), cv2.COLOR_GRAY2BGR),polys,texts

def write_worn_pages(folder, name, n, kind, seed):
    "A set of worn pages, in PaddleOCR's form"
    (folder/name).mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        image,polys,texts = worn_page(kind, np.random.default_rng([seed, i]), font_files('dejavu'))
        cv2.imwrite(str(folder/name/f'{i:04}.png'), image)
        rows.append(f'{name}/{i:04}.png\t{page_label(polys, texts)}\n')
    (folder/f'{name}.txt').write_text(''.join(rows), encoding='utf-8')

def made(folder, kinds, pages, tests):
    "Worn pages of each kind, as FOLDER of `--data`"
    for i,kind in enumerate(kinds):
        for part,n in (('train', 3*pages), ('test', tests)):
            if not (folder/kind/f'{part}.txt').exists(): write_worn_pages(folder/kind, part, n, kind, 100*i+(part=='test'))
    return folder

def worth(exp, a, data):
    "hmean on the test pages of each kind"
    res = {}
    for kind in a.kinds:
        files = [f'Eval.dataset.data_dir={data/kind}', f'Eval.dataset.label_file_list=[{first(data/kind/"test.txt", a.tests)}]']
        config = load_config(a.config, [*a.o, *files])
        res[kind] = round(evaluate(model_of(exp), build_dl(config, 'Eval'), exp.decoder, build_metric(config))['hmean'], 4)
    return res

def run(a, data, kind, seed):
    "Numbers of one run"
    folder = a.out/f'{kind}_{a.pages}_{seed}'
    chosen(data, kind, a.pages, seed, folder/'pages')
    files = [f'{side}.dataset.{k}' for side,part in (('Train','train'),('Eval','val')) for k in (f'data_dir={data/kind}', f'label_file_list=[{folder}/pages/{part}.txt]')]
    start = time.perf_counter()
    exp = experiment(load_config(a.config, [f'Global.seed={seed}', f'Global.save_model_dir={folder}', *files, *a.o]))
    learn = train(exp)
    seconds = round(time.perf_counter()-start)
    return dict(kind=kind, lines=a.pages, seed=seed, steps=learn.train_iter, best_step=learn.summary['best']['step'], seconds=seconds,
        accuracy=worth(exp, a, data))

GRID = [(b, 1.5) for b in (.3, .4, .5, .6, .7)] + [(.6, u) for u in (1.3, 1.7, 2.)] # box_thresh, unclip_ratio; the preset's are .6 and 1.5

def by_grid(a, data, kind):
    "Precision, recall and hmean of the released detector with other thresholds; its maps are computed once"
    files = [f'Eval.dataset.data_dir={data/kind}', f'Eval.dataset.label_file_list=[{first(data/kind/"test.txt", a.tests)}]']
    config = load_config(a.config, [*a.o, *files])
    model,metrics = model_of(ready_networks(config)),{k: build_metric(config) for k in GRID}
    decoders = {(b,u): decoder_of(load_config(a.config, [*a.o, *files, f'PostProcess.box_thresh={b}', f'PostProcess.unclip_ratio={u}'])) for b,u in GRID}
    with at_rest(model):
        for batch in build_dl(config, 'Eval'):
            maps = model(batch[0])
            for k,metric in metrics.items(): metric(decoders[k](maps, batch[1]), batch)
    numbers = {k: metric.get_metric() for k,metric in metrics.items()}
    return [dict(kind=kind, box_thresh=b, unclip_ratio=u, **{k: round(v, 4) for k,v in numbers[b,u].items()}) for b,u in GRID]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path)
    p.add_argument('--kinds', nargs='+', default=list(KINDS), help='that are measured; those in --train are trained on')
    p.add_argument('--train', nargs='+', default=['thermal'])
    p.add_argument('--pages', type=int, default=15)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--tests', type=int, default=30, help='pages of each kind that are measured')
    p.add_argument('--config', default='det/finetune')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/finetune_det'))
    p.add_argument('--grid', action='store_true')
    p.add_argument('-o', nargs='+', default=[], metavar='KEY=VALUE', help='for the configuration')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    data = a.data or made(a.out/'pages', a.kinds, a.pages, a.tests)
    command = ' '.join(['python -m benchmarks.finetune_det', *sys.argv[1:]])
    if a.grid:
        a.out.mkdir(parents=True, exist_ok=True)
        rows = [row for kind in a.kinds for row in by_grid(a, data, kind)]
        with write_beside(a.out/'grid.json') as tmp: tmp.write_text(json.dumps(dict(command=command, machine=machine(), rows=rows), indent=1))
        for row in rows: print(row)
        return
    before = kept(a.out/'before.json', lambda: worth(ready_networks(load_config(a.config, a.o)), a, data))
    print(before, flush=True)
    rows = []
    for kind in a.train:
        for seed in a.seeds:
            rows.append(kept(a.out/f'{kind}_{a.pages}_{seed}.json', lambda: run(a, data, kind, seed)))
            won = {k: round(100*(v-before[k]), 1) for k,v in rows[-1]['accuracy'].items()}
            print({k: v for k,v in rows[-1].items() if k!='accuracy'}, won, flush=True)
    result = dict(command=command, machine=machine(), threads=a.threads, before=before, table=table(before, rows), rows=rows)
    with write_beside(a.out/'finetune_det.json') as tmp: tmp.write_text(json.dumps(result, indent=1))
    for row in result['table']: print(row)

if __name__=='__main__': main()
