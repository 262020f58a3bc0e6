"""What `configs/rec/finetune.yml` makes of a released recogniser: better at lines of one kind, and at other kinds no worse?

    python -m benchmarks.finetune [--data FOLDER] [--kinds fax thermal ...] [--sizes 50 250 1000] [--seeds 0 1 2] [-o KEY=VALUE ...]

FOLDER/KIND/train.txt and test.txt are label files, their pictures beside them. Without --data worn lines are rendered, with labels in the case of
the pictures, or in capitals with --upper. Of so many lines of one kind a fifth is put aside to choose the best state, as a user would do. Each run is
the whole command, and its numbers are written when it ends; a run whose numbers are there is not run again. At the end `finetune.json` is written
beside them; copied to `benchmarks/results`, it is what the chapter shows."""
import argparse, json, math, random, sys, time
from pathlib import Path
import torch
from benchmarks.quickstart import machine
from distillbook.config import load_config
from distillbook.config.assembly import experiment, ready_networks
from distillbook.config.data import build_dl
from distillbook.config.evaluation import build_metric
from distillbook.core import write_beside
from distillbook.rec.worn import WEAR, write_worn_lines
from distillbook.use.evaluation import evaluate
from distillbook.use.training import model_of, train

def rows_of(path): return path.read_text(encoding='utf-8').splitlines()

def made(folder, kinds, most, tests, upper):
    "Worn lines of each kind, as FOLDER of `--data`"
    for i,kind in enumerate(kinds):
        for part,n,fonts in (('train', most, 'dejavu'), ('test', tests, 'dejavu')):
            if not (folder/kind/f'{part}.txt').exists(): write_worn_lines(folder/kind, part, n, kind, 100*i+(part=='test'), upper, fonts)
    return folder

def chosen(data, kind, n, seed, folder):
    "Label files of `n` lines of a kind: four fifths to train on, and a fifth to choose by"
    lines = rows_of(data/kind/'train.txt')
    random.Random(seed).shuffle(lines)
    cut = n - n//5
    folder.mkdir(parents=True, exist_ok=True)
    for part,some in (('train', lines[:cut]), ('val', lines[cut:n])): (folder/f'{part}.txt').write_text('\n'.join(some)+'\n', encoding='utf-8')
    return cut

def worth(exp, a, data):
    "Accuracy on the test lines of each kind"
    res = {}
    for kind in a.kinds:
        files = [f'Eval.dataset.data_dir={data/kind}', f'Eval.dataset.label_file_list=[{first(data/kind/"test.txt", a.tests)}]']
        config = load_config(a.config, [*a.o, *files])
        res[kind] = round(evaluate(model_of(exp), build_dl(config, 'Eval'), exp.decoder, build_metric(config))['acc'], 4)
    return res

def kept(path, make):
    "What was written, or else what is made now"
    if not path.exists():
        made = make()
        with write_beside(path) as tmp: tmp.write_text(json.dumps(made))
    return json.loads(path.read_text())

def first(path, n):
    "The label file cut to its first lines"
    cut = path.with_name(f'{path.stem}_{n}.txt')
    cut.write_text('\n'.join(rows_of(path)[:n])+'\n', encoding='utf-8')
    return cut

def run(a, data, kind, n, seed):
    "Numbers of one run"
    folder = a.out/f'{kind}_{n}_{seed}'
    cut = chosen(data, kind, n, seed, folder/'lines')
    epochs = max(1, round(a.steps/math.ceil(cut/16)))
    every = [f'Global.epoch_num={epochs}', f'Global.eval_batch_step=[0,{max(1, a.steps//4)}]', f'Global.seed={seed}', f'Global.save_model_dir={folder}']
    files = [f'{side}.dataset.{k}' for side,part in (('Train','train'),('Eval','val')) for k in (f'data_dir={data/kind}', f'label_file_list=[{folder}/lines/{part}.txt]')]
    start = time.perf_counter()
    exp = experiment(load_config(a.config, [*every, *files, *a.o]))
    learn = train(exp)
    seconds = round(time.perf_counter()-start)
    return dict(kind=kind, lines=n, seed=seed, steps=learn.train_iter, best_step=learn.summary['best']['step'], seconds=seconds,
        accuracy=worth(exp, a, data))

def table(before, rows):
    "Points of accuracy won on lines of each kind, a number a seed; `own` is the kind that was trained on"
    res = []
    for kind,n in dict.fromkeys((r['kind'], r['lines']) for r in rows):
        some = [r['accuracy'] for r in rows if (r['kind'], r['lines'])==(kind, n)]
        won = {k: [round(100*(o[k]-before[k]), 1) for o in some] for k in before}
        res.append(dict(kind=kind, lines=n, own=won.pop(kind), others=won))
    return res

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path)
    p.add_argument('--kinds', nargs='+', default=list(WEAR), help='that are measured; those in --train are trained on')
    p.add_argument('--train', nargs='+', default=['fax'])
    p.add_argument('--sizes', type=int, nargs='+', default=[50, 250, 1000])
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--steps', type=int, default=300)
    p.add_argument('--tests', type=int, default=300, help='lines of each kind that are measured')
    p.add_argument('--upper', action='store_true')
    p.add_argument('--config', default='rec/finetune')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/finetune'))
    p.add_argument('-o', nargs='+', default=[], metavar='KEY=VALUE', help='for the configuration')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    data = a.data or made(a.out/'lines', a.kinds, max(a.sizes), a.tests, a.upper)
    before = kept(a.out/'before.json', lambda: worth(ready_networks(load_config(a.config, a.o)), a, data))
    print(before, flush=True)
    runs = [(kind, n, seed) for n in a.sizes for seed in a.seeds for kind in a.train]
    rows = []
    for kind,n,seed in runs:
        rows.append(kept(a.out/f'{kind}_{n}_{seed}.json', lambda: run(a, data, kind, n, seed)))
        won = {k: round(100*(v-before[k]), 1) for k,v in rows[-1]['accuracy'].items()}
        print({k: v for k,v in rows[-1].items() if k!='accuracy'}, won, flush=True)
    command = ' '.join(['python -m benchmarks.finetune', *sys.argv[1:]])
    result = dict(command=command, machine=machine(), threads=a.threads, before=before, table=table(before, rows), rows=rows)
    with write_beside(a.out/'finetune.json') as tmp: tmp.write_text(json.dumps(result, indent=1))
    for row in result['table']: print(row)

if __name__=='__main__': main()
