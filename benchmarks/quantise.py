"""PP-OCRv3's recogniser in eight bits: plain, calibrated, with channels of one size, and taught by its float self.

    python -m benchmarks.quantise [--steps 100] [--lines 300] [--threads 1] [--out FOLDER]

Everything is read by onnxruntime from the files that are written. Calibrated and trained on made-up printed lines in six families of fonts, without
their labels; measured in Roboto, which is none of the six, on made-up words and on printed lines, where spaces do not count. Times are of one line on one
thread, files in turns, over the float file's. `quantise.json` is written after each stage; copied to `benchmarks/results`, it is
what the chapter on eight bits shows. The fonts are those of the extra `fonts`."""
import argparse, json, sys, time
from functools import partial
from pathlib import Path
import numpy as np, torch
from fastai.basics import OptimWrapper, set_seed
from rapidfuzz.distance import Levenshtein
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.data.render import font_files, make_words
from distillbook.learner import distill_learner
from distillbook.losses import kd
from distillbook.rec.decode import ctc_decode
from distillbook.rec.prints import PrintedLines
from distillbook.rec.render import Lines, normalise, render_words, word_dls
from distillbook.terms import Term
from distillbook.use.export import export_onnx, open_onnx, quantise
from distillbook.use.quantise import Steps, export_int8, harms, places, quantisable
from distillbook.use.teachers import load_teacher

FAMILIES = 'dejavu','lato','arimo','open-sans','pt-serif','inconsolata' # To learn from

def words(n, seed, family): return render_words(make_words(n, seed), font_files(family), seed=seed)

def printed(n, seed, families=FAMILIES):
    "Lines of made-up print"
    sources = [PrintedLines(n, fonts=f, seed=seed) for f in families]
    rows = [sources[i%len(sources)][i] for i in range(n)]
    images = np.zeros((n,48,320), np.uint8)
    for im,row in zip(images, rows): im[:,:row['image'].shape[1]] = row['image'][...,0]
    return Lines(images, np.array([row['image'].shape[1] for row in rows]), [row['label'] for row in rows])

def batches(lines, bs=8): return [normalise(lines.images[i:i+bs], lines.widths[i:i+bs]) for i in range(0, len(lines), bs)]

def read(session, pictures, alphabet):
    "What stands in pictures, one at a time"
    return [ctc_decode(torch.tensor(session.run(None, {'x': x.numpy()})[0]), alphabet, probs=True)[0][0] for x in pictures]

def right(reads, texts):
    "Exact accuracy and the share of characters, without spaces"
    pairs = [(r.replace(' ', ''), t.replace(' ', '')) for r,t in zip(reads, texts)]
    errors = sum(Levenshtein.distance(*p) for p in pairs)
    return dict(exact=round(float(np.mean([a==b for a,b in pairs])), 4), characters=round(1-errors/sum(len(t) for _,t in pairs), 4))

def measured(path, tests, alphabet):
    session,rows = open_onnx(path, 1)[0],dict(kB=path.stat().st_size//1000)
    for k,lines in tests.items():
        xs = [normalise(lines.images[i:i+1,:,:w]) for i,w in enumerate(lines.widths)]
        rows[k] = right(read(session, xs, alphabet), lines.words)
    return rows

def train(student, teacher, alphabet, steps, lr, seed=0):
    set_seed(seed)
    lines,watch = printed(8*steps, 100+seed),printed(16, 99)
    nets,terms = dict(Teacher=teacher, Student=student),[Term(partial(kd, T=1.), 'Student', 'Teacher')]
    adamw = partial(OptimWrapper, opt=torch.optim.AdamW)
    learn = distill_learner(word_dls(lines, watch, 8, alphabet, seed), nets, terms, frozen=['Teacher'], opt_func=adamw)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, lr)
    return learn.net('Student').eval()

def divergence(files, tests, n=60):
    "Of what each file says from what the float file says, nats a frame"
    sessions,found = {k: open_onnx(f, 1)[0] for k,f in files.items()},{k: {} for k in files}
    for name,lines in tests.items():
        xs = [normalise(lines.images[i:i+1,:,:w]).numpy() for i,w in enumerate(lines.widths[:n])]
        def says(k): return [torch.tensor(sessions[k].run(None, {'x': x})[0]).clamp(min=1e-30) for x in xs]
        floats = says('float')
        for k in files: found[k][name] = round(float(np.mean([(p*(p.log()-q.log())).sum(-1).mean().item() for p,q in zip(floats, says(k))])), 5)
    return found

def times(files, test, n=60):
    "Milliseconds of a line, medians of turns, over those of the float file"
    sessions,ms = {k: open_onnx(f, 1)[0] for k,f in files.items()},{k: [] for k in files}
    for i in range(n):
        x = normalise(test.images[i:i+1], test.widths[i:i+1]).numpy()
        for k,s in sessions.items():
            start = time.perf_counter()
            s.run(None, {'x': x})
            ms[k].append((time.perf_counter()-start)*1e3)
    return {k: dict(ms=round(float(np.median(v)), 2), ratio=round(float(np.median(np.array(v)/np.array(ms['float']))), 3)) for k,v in ms.items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=100)
    p.add_argument('--lines', type=int, default=300)
    p.add_argument('--lr', type=float, default=5e-5)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/quantise'))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out/'quantise.json'
    net,alphabet = load_teacher('PP-OCRv3_rec')
    tests = dict(words=words(a.lines, 5, 'roboto'), printed=printed(a.lines, 1, ['roboto']))
    calib,few = batches(printed(64, 6)),batches(words(8, 7, 'roboto'))
    result = json.loads(file.read_text()) if file.exists() else dict(rows={}, cpu_seconds={})
    result |= dict(command=' '.join(['python -m benchmarks.quantise', *sys.argv[1:]]), machine=machine(), steps=a.steps)
    def save():
        with write_beside(file) as tmp: tmp.write_text(json.dumps(result, indent=1))
    def stage(name, make):
        path = a.out/f'{name.replace(" ", "_").replace(",", "")}.onnx'
        if name not in result['rows'] or not path.exists():
            start = time.process_time()
            make(path)
            result['cpu_seconds'][name] = round(time.process_time()-start)
            result['rows'][name] = measured(path, tests, alphabet)
            save()
            print(name, result['rows'][name], f"{result['cpu_seconds'][name]} s", flush=True)
        return path
    def compare():
        result['divergence'] = divergence(files, tests)
        result['times'] = times(files, tests['words'])
        save()
    def ours(equal, taught=False):
        def make(path):
            q = quantisable(net, calib, equal)
            if taught: q = train(q, net, alphabet, a.steps, a.lr)
            export_int8(q, path, calib[:2], 'rec', alphabet)
        return make
    files = {'float': stage('float', lambda path: export_onnx(net, path, 'rec', alphabet))}
    files['plain int8'] = stage('plain int8', lambda path: quantise(files['float'], calib, path))
    for name,make in {'calibrated': ours(False), 'equal channels': ours(True), 'equal channels, teacher': ours(True, True),
        'calibrated, teacher': ours(False, True)}.items(): files[name] = stage(name, make)
    if 'harms' not in result:
        q = quantisable(net, calib, False)
        result['harms'] = dict(apart=harms(q, net, few))
        result['ranges'] = {n: [round(m.low.item(), 3), round(m.high.item(), 3)] for n,m in places(q).items() if isinstance(m, Steps)}
        result['harms']['equal'] = harms(quantisable(net, calib), net, few)
        save()
    compare()
    print(json.dumps(result['times'], indent=1))

if __name__=='__main__': main()
