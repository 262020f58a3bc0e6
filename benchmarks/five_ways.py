"""One small recogniser trained in five ways on the same rendered words, with several seeds.

    python -m benchmarks.five_ways [--seeds 0 1 2] [--epochs 6] [--threads 1] [--out FOLDER]

The ways: labels alone; mutual learning (PaddleOCR's DML) of two and of three networks; DML with the distance between the feature maps besides;
the frozen, released PP-OCRv3 recogniser as teacher. Words, pictures and steps are the same for all; a seed sets the first weights (the student's are the
same in all five ways) and the order of the words. Each run's numbers are written when it ends, and a run whose numbers are there is not run again."""
import argparse, json, time
from functools import partial
from pathlib import Path
import torch
from fastai.basics import OptimWrapper, set_seed
from distillbook.config.files import load_config
from distillbook.core import write_beside
from distillbook.learner import distill_learner
from distillbook.losses import distance, dml_paddle, kd
from distillbook.rec.render import word_dls
from distillbook.rec.decode import RecMetric
from distillbook.rec.labels import Alphabet
from distillbook.rec.losses import ctc_loss
from distillbook.rec.nets import PlainStudent
from distillbook.use.run import batches, get_teacher, read_all, score, word_sets
from distillbook.terms import Term

WAYS = ['labels', 'dml2', 'dml3', 'dml2+distance', 'frozen teacher']

def terms(way):
    "Networks besides the student, and the terms"
    others = dict(labels=[], dml3=['Student2', 'Student3']).get(way, ['Teacher'] if way=='frozen teacher' else ['Student2'])
    ts = [Term(ctc_loss, n, name=f'ctc_{n}') for n in ['Student', *others] if n!='Teacher']
    if way=='frozen teacher': ts.append(Term(partial(kd, T=1.), 'Student', 'Teacher', weight=20.))
    elif way!='labels': ts += [Term(dml_paddle, 'Student', n) for n in others]
    if 'distance' in way: ts.append(Term(distance, 'Student.stages', 'Student2.stages'))
    return others,ts

def run(way, seed, epochs, cfg, sets, teacher):
    "Numbers of one run"
    alphabet = Alphabet(cfg['Global']['alphabet'])
    set_seed(seed)
    nets = dict(Student=PlainStudent(len(alphabet)))
    others,ts = terms(way)
    nets |= {n: teacher if n=='Teacher' else PlainStudent(len(alphabet)) for n in others}
    nets = {n: net if n=='Teacher' else net.to(memory_format=torch.channels_last) for n,net in nets.items()}
    dls = word_dls(sets['train'], sets['valid'], cfg['Train']['loader']['batch_size_per_card'], alphabet, seed)
    learn = distill_learner(dls, nets, ts, frozen=[n for n in nets if n=='Teacher'], metrics=RecMetric(alphabet),
        opt_func=partial(OptimWrapper, opt=torch.optim.AdamW, betas=(.9, .99)), lr=cfg['Optimizer']['lr'], wd=cfg['Optimizer']['weight_decay'])
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    took = time.perf_counter()-start
    scores = {n: {s: score(read_all(net, sets[s], alphabet), sets[s].words) for s in ('heldout','unseen')} for n,net in nets.items() if n!='Teacher'}
    return dict(way=way, seed=seed, epochs=epochs, steps=epochs*len(dls.train), seconds=round(took, 1), threads=torch.get_num_threads(), scores=scores,
        valid=learn.table()['Student_acc'].tolist(), terms={k: round(v, 4) for k,v in learn.parts().tail(50).mean().items()})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ways', nargs='+', default=WAYS, choices=WAYS)
    p.add_argument('--epochs', type=int, default=6)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', default='runs/five_ways')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    cfg = load_config('configs/quickstart.yml', [f'Global.save_model_dir={a.out}'])
    sets = word_sets(cfg)
    teacher = get_teacher(cfg, Alphabet(cfg['Global']['alphabet'])) if 'frozen teacher' in a.ways else None
    if teacher:
        for s in sets.values():
            for x in batches(s): teacher(x)
    for seed in a.seeds:
        for way in a.ways:
            path = Path(a.out)/f'{way.replace(" ", "_")}_{seed}_{a.epochs}.json'
            if not path.exists():
                got = run(way, seed, a.epochs, cfg, sets, teacher)
                with write_beside(path) as tmp: tmp.write_text(json.dumps(got))
            got = json.loads(path.read_text())
            s = got['scores']['Student']
            print(f"{way:15} seed {seed}: student held out {s['heldout']['exact']:.3f}, unseen font {s['unseen']['exact']:.3f}; {got['seconds']:.0f} s", flush=True)

if __name__=='__main__': main()
