"""What a head that writes gives the head that reads: CTC alone, CTC beside NRTR, and CTC behind NRTR, as PP-OCRv4 has it.

    python -m benchmarks.guide [--seeds 0 1 2] [--steps 480] [--threads 1] [--out FOLDER]

A small backbone with PP-OCRv4's two heads learns to read rendered numbers of three to six digits. Pictures and steps are the same for all runs; a seed
sets the first weights and the order. Each run's numbers are written when it ends, and a run whose numbers are there is not run again. At the end
`guide.json` is written beside them; copied to `benchmarks/results`, it is what the chapter shows."""
import argparse, json, sys, time
from pathlib import Path
import numpy as np, torch
from fastai.basics import set_seed
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.rec.backbone import PlainBackbone
from distillbook.rec.decode import ctc_decode
from distillbook.rec.labels import NRTRClasses, multi_label
from distillbook.rec.losses import ctc_loss, nrtr_loss
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel
from distillbook.rec.nrtr import NRTRHead
from distillbook.rec.render import font_files, normalise, render_words

WIDTH,MOST = 112,8
classes = NRTRClasses('0123456789')
# Does NRTR train too, and does CTC's gradient reach the backbone?
RUNS = {'CTC alone': (False,True), 'CTC and NRTR': (True,True), 'NRTR guides CTC': (True,False)}

def net(ctc_reaches):
    "A small backbone with PP-OCRv4's neck and heads"
    body = PlainBackbone((12,24,48,64))
    svtr = EncoderWithSVTR(64, dims=48, depth=1, hidden_dims=48, use_guide=not ctc_reaches, kernel_size=(1,3))
    neck = SequenceEncoder(svtr)
    head = MultiHead(neck, CTCHead(48, len(classes.alphabet)), gtc_head=NRTRHead(64, len(classes), 64, MOST, 2))
    return RecModel(body, None, head)

def numbers(n, seed):
    "Rendered numbers, and their labels for both heads"
    rng = np.random.default_rng(seed)
    texts = [''.join(map(str, rng.integers(0, 10, rng.integers(3, 7)))) for _ in range(n)]
    lines = render_words(texts, font_files('dejavu'), seed, width=WIDTH)
    rows = [multi_label(t, classes, MOST) for t in texts]
    labels = {k: torch.from_numpy(np.stack([np.asarray(r[k]) for r in rows])) for k in rows[0]}
    return normalise(lines.images, lines.widths),labels,texts

def run(name, seed, steps, data, held):
    "Accuracy of CTC every forty steps, and where the guide looks in the end"
    guided,reaches = RUNS[name]
    set_seed(seed)
    model = net(reaches)
    opt = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=.01)
    order,curve = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed)),[]
    for step in range(steps):
        i = order[torch.arange(step*32, step*32+32)%len(order)]
        y = {k: v[i] for k,v in data[1].items()}
        out = model.train()(data[0][i], (y['label_ctc'], y['label_gtc'], y['length']))
        loss = ctc_loss(out['ctc'], y['label_ctc'], y['length'])
        if guided: loss = loss + nrtr_loss(out['gtc'], y['label_gtc'])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.)
        opt.step()
        if (step+1)%40==0: curve.append(accuracy(model, held))
    return dict(curve=curve) | (dict(looks=looks(model, held)) if name=='NRTR guides CTC' else {})

@torch.no_grad()
def accuracy(model, held):
    probs = torch.cat([model.eval()(x) for x in held[0].split(64)])
    reads = [t for t,_ in ctc_decode(probs, classes.alphabet, probs=True)]
    return sum(a==b for a,b in zip(reads, held[2]))/len(reads)

@torch.no_grad()
def looks(model, held, n=3):
    "What the guide writes of some lines, and where it looks for each character"
    head = model.eval().head
    probs,maps = head.gtc_head.write(head.before_gtc(model.backbone(held[0][:n])))
    reads = [classes.decode(o) for o in probs.argmax(-1).tolist()]
    return [dict(text=t, maps=m[:len(t)+1].round(decimals=3).tolist()) for t,m in zip(reads, maps)]

def main():
    ap = argparse.ArgumentParser(prog='python -m benchmarks.guide', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--steps', type=int, default=480)
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--out', type=Path, default=Path('runs/guide'))
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    data,held = numbers(4000, 0),numbers(256, 1)
    found = {name: {} for name in RUNS}
    for seed in a.seeds:
        for name in RUNS:
            path = a.out/f'{name.replace(" ", "_")}_{seed}.json'
            if not path.exists():
                start = time.process_time()
                made = run(name, seed, a.steps, data, held)
                with write_beside(path) as tmp: tmp.write_text(json.dumps(made | dict(seconds=round(time.process_time()-start))))
            found[name][seed] = json.loads(path.read_text())
            print(name, seed, found[name][seed]['curve'], flush=True)
    res = dict(machine=machine(), torch=torch.__version__, steps=a.steps, command=' '.join(['python -m benchmarks.guide', *sys.argv[1:]]), runs=found)
    with write_beside(a.out/'guide.json') as tmp: tmp.write_text(json.dumps(res, indent=1))

if __name__=='__main__': main()
