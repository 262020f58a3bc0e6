"""What each of the five losses of PaddleOCR's PP-OCRv3 distillation guide does: all five, and each of them left out in turn.

    python -m benchmarks.five_losses [--seeds 0 1] [--runs CTC SAR ...] [--epochs 14] [--threads 1] [--out FOLDER]

Two networks built like PP-OCRv3's recogniser, but small, learn to read rendered numbers of two to four digits. Words, pictures and steps are
the same for all runs; a seed sets the first weights and the order of the words. Each run's numbers are written when it ends, and a run whose numbers
are there is not run again. At the end `five_losses.json` and `five_losses.png` are written beside them; copied to `benchmarks/results`, they are what
the chapter shows."""
import argparse, json, random, sys, time
from functools import cache, partial
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, torch
from torch import nn
from fastai.basics import Callback, CancelValidException, DataLoaders, set_seed
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.learner import distill_learner
from distillbook.losses import distance, dml_paddle
from distillbook.layers import conv_bn
from distillbook.rec.render import WordDL, font_files, normalise, render_words
from distillbook.rec.backbone import Residual
from distillbook.rec.decode import ctc_decode, sar_decode
from distillbook.rec.labels import SARClasses, multi_label
from distillbook.rec.losses import ctc_loss
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel
from distillbook.rec.sar import SARHead, sar_loss
from distillbook.terms import Term
from distillbook.use.evaluation import at_rest

LOSSES = ['dml_ctc', 'dml_sar', 'distance', 'CTC', 'SAR']
H,W,L = 32,64,6
classes = SARClasses(list('0123456789'))

class Backbone(nn.Module):
    "Plain convolutions, [N,3,32,W] to [N,C,1,W/4]"
    def __init__(self, channels=(16, 32, 64, 96, 128)):
        super().__init__()
        conv = partial(conv_bn, act=nn.ReLU, names=('conv', 'norm'))
        pairs = list(zip(channels, channels[1:]))
        self.stem,self.out_channels = conv(1, channels[0], 5, 2),channels[-1]
        self.stages = nn.Sequential()
        for (ni,nf),stride in zip(pairs, (2, (2,1), (2,1), (2,1))):
            self.stages.append(nn.Sequential(conv(ni, nf, 3, stride), Residual(conv(nf, nf, 3, 1))))

    def forward(self, x): return self.stages(self.stem(x.mean(1, keepdim=True)))

def net(use_guide=True):
    "A small recogniser with the parts of PP-OCRv3's, and its outputs"
    body = Backbone()
    neck = SequenceEncoder(EncoderWithSVTR(body.out_channels, dims=48, depth=1, hidden_dims=64, use_guide=use_guide))
    ctc = CTCHead(neck.out_channels, len(classes.alphabet))
    sar = SARHead(body.out_channels, len(classes), enc_dim=64, max_text_length=L-1, d_k=64)
    return RecModel(body, None, MultiHead(neck, ctc, sar_head=sar), return_all_feats=True)

def terms(left_out=''):
    "The guide's terms, but for one of `LOSSES`; of a batch's targets CTC takes its labels and lengths, SAR its own labels"
    both,sar = ('Student','Teacher'),partial(sar_loss, ignore_index=classes.pad)
    made = dict(
        dml_ctc=[Term(dml_paddle, 'Student.head_out.ctc', 'Teacher.head_out.ctc', name='dml_ctc')],
        dml_sar=[Term(dml_paddle, 'Student.head_out.sar', 'Teacher.head_out.sar', weight=.5, name='dml_sar')],
        distance=[Term(distance, 'Student.backbone_out', 'Teacher.backbone_out', name='distance')],
        CTC=[Term(ctc_loss, f'{n}.head_out.ctc', targets=[0,2], name=f'CTC {n}') for n in both],
        SAR=[Term(sar, f'{n}.head_out.sar', targets=[1], name=f'SAR {n}') for n in both])
    return [t for k,ts in made.items() if k!=left_out for t in ts]

def numbers(n, seed):
    "Numbers of two to four digits"
    rng = random.Random(seed)
    return [str(rng.randint(10, 9999) if rng.random()<.6 else rng.randint(10, 999)) for _ in range(n)]

class Words:
    "Rendered words with both labels; indexed by a list of numbers"
    def __init__(self, words, seed):
        self.lines = render_words(words, font_files('dejavu'), seed, H, W, noise=False)
        labels = [multi_label(w, classes, L) for w in words]
        self.targets = [torch.from_numpy(np.stack([o[k] for o in labels])) for k in ('label_ctc','label_sar','length')]
        self.targets.append(torch.from_numpy(self.lines.widths/W))
    def __len__(self): return len(self.lines)
    def __getitem__(self, idxs):
        x = normalise(self.lines.images[idxs], self.lines.widths[idxs])
        return x, *(o[idxs] for o in self.targets)

@torch.no_grad()
def look(nets, data):
    "What both networks make of held-out pictures"
    with at_rest(nets):
        x,label,_,length,valid = data[np.arange(len(data))]
        a,b = (nets[n](x)['head_out'] for n in ('Student','Teacher'))
        maps,own = nets['Student'].backbone(x),nets['Student']
        written = own.head.sar_head(maps, [valid])
        apart = distance(maps, nets['Teacher'].backbone(x)).item()
    said,other = (texts(o) for o in (a,b))
    return dict(exact=share(said, data.lines.words), exact_teacher=share(other, data.lines.words),
        exact_sar=share([t for t,_ in sar_decode(written, classes, probs=True)], data.lines.words),
        ctc=ctc_loss(a.log(), label, length).item(), differ=1-share(said, other),
        apart=((a-b)*(a.log()-b.log())).sum(-1).mean().item()/2, maps=apart, size=maps.square().mean().item())

def texts(probs): return [t for t,_ in ctc_decode(probs, classes.alphabet, probs=True)]

def share(said, truth):
    "How many are the same"
    return sum(a==b for a,b in zip(said, truth))/len(truth)

class Looks(Callback):
    "A look after each epoch, in the place of validation"
    def __init__(self, data): self.data,self.rows = data,[]
    def before_validate(self):
        self.rows.append(look(self.learn.model, self.data))
        raise CancelValidException

def run(left_out, seed, epochs, train, heldout, bs=64):
    "Numbers of one run"
    set_seed(seed)
    dl = WordDL(train, bs=bs, shuffle=True, drop_last=True)
    dl.rng,looks = random.Random(seed),Looks(heldout)
    dls = DataLoaders(dl, WordDL(heldout, bs=2*bs))
    learn = distill_learner(dls, dict(Teacher=net(), Student=net()), terms(left_out), cbs=looks, lr=1e-2)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    seconds = round(time.perf_counter()-start, 1)
    parts = learn.parts().groupby(lambda i: i//len(dl)).mean().round(4)
    return dict(seed=seed, epochs=epochs, steps=epochs*len(dl), seconds=seconds, threads=torch.get_num_threads(),
        rows=looks.rows, parts=parts.to_dict('list'))

# ---- what the chapter shows

def named(left_out): return f'without {left_out}' if left_out else 'all five'

def last_row(left_out, got):
    "A run as a row of the chapter's table"
    last = got['rows'][-1]
    row = dict(run=named(left_out), seed=got['seed'], CTC=last['exact'], SAR=last['exact_sar'], differ=last['differ'])
    row = {k: round(v, 4) if isinstance(v, float) else v for k,v in row.items()}
    return row | dict(maps_apart=round(last['maps']/last['size'], 3), seconds=round(got['seconds']))

def draw(runs, path):
    "What was read after each epoch; the second seed is dashed"
    fig,axs = plt.subplots(1, 3, figsize=(12,3.4), dpi=80)
    titles = dict(exact='read exactly, CTC head', exact_sar='read exactly, SAR head', differ='words on which the two differ')
    colours = dict(zip(['', *LOSSES], ['black', *(f'C{i}' for i in range(5))]))
    for ax,(key,title) in zip(axs, titles.items()):
        for left_out,got in runs:
            values = [row[key] for row in got['rows']]
            style = dict(color=colours[left_out], lw=1.2 if left_out else 2, ls='--' if got['seed'] else '-')
            ax.plot(range(1, len(values)+1), values, label=None if got['seed'] else named(left_out), **style)
        ax.set(title=title, xlabel='epoch', ylim=(-.03,1.03))
    axs[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    every = ['all', *LOSSES]
    p.add_argument('--runs', nargs='+', default=every, help='all five, or what is left out', choices=every)
    p.add_argument('--epochs', type=int, default=14)
    p.add_argument('--words', type=int, default=3000)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', type=Path, default=Path('runs/five_losses'))
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    words,runs = numbers(a.words+400, 0),[]
    @cache
    def sets(): return Words(words[:a.words], 0),Words(words[a.words:], 1)
    for seed in a.seeds:
        for left_out in ['' if r=='all' else r for r in a.runs]:
            path = a.out/f"{'without_'+left_out if left_out else 'all'}_{seed}.json"
            if not path.exists():
                got = run(left_out, seed, a.epochs, *sets())
                with write_beside(path) as tmp: tmp.write_text(json.dumps(got))
            runs.append((left_out, json.loads(path.read_text())))
            print(', '.join(f'{k} {v}' for k,v in last_row(*runs[-1]).items()), flush=True)
    command = ' '.join(['python -m benchmarks.five_losses', *sys.argv[1:]])
    result = dict(command=command, machine=machine(), epochs=a.epochs, words=a.words, rows=[last_row(*r) for r in runs])
    with write_beside(a.out/'five_losses.json') as tmp: tmp.write_text(json.dumps(result, indent=1))
    draw(runs, a.out/'five_losses.png')

if __name__=='__main__': main()
