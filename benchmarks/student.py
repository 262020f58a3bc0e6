"""What the networks of a run, and released readers, read of real lines: of `configs/rec/student.yml`, which learns from rendered ones.

    python -m benchmarks.student RUN --data FOLDER [--kinds receipts forms signs] [--readers PP-OCRv3_rec]

FOLDER/KIND/test.txt is a label file, its pictures beside it. Counted are lines read right exactly, but for spaces, and but for case and spaces (labels
may be in capitals whatever is printed). Writes `real.json` into the run's folder; `benchmarks/results/student.json` has it, and how the run came about."""
import argparse, json, sys
from pathlib import Path
import torch
from benchmarks.quickstart import machine
from distillbook.cli import load_trained
from distillbook.config.assembly import ready_networks
from distillbook.core import write_beside
from distillbook.data.pictures import read_picture
from distillbook.rec.decode import ctc_decode
from distillbook.rec.render import fit_line
from distillbook.use.results import predict
from distillbook.use.teachers import load_teacher

COUNTS = {'exact': str, 'but for spaces': lambda t: t.replace(' ', ''), 'but for case and spaces': lambda t: t.replace(' ', '').lower()}

def count(reads, labels):
    "The shares of lines that are read right"
    return dict(lines=len(labels)) | {k: round(sum(f(r)==f(l) for r,l in zip(reads, labels))/len(labels), 3) for k,f in COUNTS.items()}

def by_run(exp, paths):
    "Network to texts"
    rows = predict(exp, paths, lambda x, *_, **__: x, {})
    names = [k for k,v in rows[0].items() if isinstance(v, dict)]
    return {k: [row[k]['label'] for row in rows] for k in names} if names else {'Student': [row['label'] for row in rows]}

def by_reader(name, paths):
    "What a released reader reads with its whole alphabet, line by line"
    net,alphabet = load_teacher(name, task='rec')
    lines = (torch.from_numpy(fit_line(read_picture(p), width=320, grow=True))[None] for p in paths)
    with torch.no_grad(): return [ctc_decode(net.eval()(x), alphabet)[0][0] for x in lines]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run', type=Path)
    p.add_argument('--data', type=Path, required=True)
    p.add_argument('--kinds', nargs='+', default=['receipts', 'forms', 'signs'])
    p.add_argument('--readers', nargs='*', default=['PP-OCRv3_rec'])
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    exp,rows = ready_networks(load_trained(None, a.run, [])),[]
    for kind in a.kinds:
        files,labels = zip(*(row.split('\t', 1) for row in (a.data/kind/'test.txt').read_text(encoding='utf-8').splitlines()))
        paths = [str(a.data/kind/f) for f in files]
        reads = by_run(exp, paths) | {name: by_reader(name, paths) for name in a.readers}
        rows += [dict(kind=kind, reader=name, **count(texts, labels)) for name,texts in reads.items()]
        for row in rows[-len(reads):]: print(row, flush=True)
    result = dict(command=' '.join(['python -m benchmarks.student', *sys.argv[1:]]), machine=machine(), rows=rows)
    with write_beside(a.run/'real.json') as tmp: tmp.write_text(json.dumps(result, indent=1))

if __name__=='__main__': main()
