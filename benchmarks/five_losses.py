"""What each of the five losses of PaddleOCR's PP-OCRv3 distillation guide does: all five, and each of them left out in turn.

    python -m benchmarks.five_losses [--seeds 0 1] [--runs CTC SAR ...] [--epochs 14] [--threads 1] [--out FOLDER]

Two networks built like PP-OCRv3's recogniser, but small, learn to read rendered numbers of two to four digits. Words, pictures and steps are
the same for all runs; a seed sets the first weights and the order of the words. Each run's numbers are written when it ends, and a run whose numbers
are there is not run again."""
import argparse, json, random, time
from functools import partial
from pathlib import Path
import numpy as np, torch
from torch import nn
from fastai.basics import Callback, CancelValidException, DataLoaders, set_seed
from distillbook.core import write_beside
from distillbook.learner import distill_learner
from distillbook.losses import distance, dml_paddle
from distillbook.layers import conv_bn
from distillbook.rec.render import WordDL, font_files, normalise, render_words
from distillbook.rec.decode import ctc_decode, sar_decode
from distillbook.rec.labels import SARClasses, multi_label
from distillbook.rec.losses import ctc_loss
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel, Residual
from distillbook.rec.sar import SARHead, sar_loss
from distillbook.terms import Term

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
        self.stages = nn.Sequential(*[nn.Sequential(conv(ni, nf, 3, s), Residual(conv(nf, nf, 3, 1))) for (ni,nf),s in zip(pairs, (2, (2,1), (2,1), (2,1)))])
    def forward(self, x): return self.stages(self.stem(x.mean(1, keepdim=True)))

def net(use_guide=True):
    "A small recogniser with the parts of PP-OCRv3's, and its outputs"
    body = Backbone()
    neck = SequenceEncoder(EncoderWithSVTR(body.out_channels, dims=48, depth=1, hidden_dims=64, use_guide=use_guide))
    sar = SARHead(body.out_channels, len(classes), enc_dim=64, max_text_length=L-1, d_k=64)
    return RecModel(body, None, MultiHead(neck, CTCHead(neck.out_channels, len(classes.alphabet)), sar), return_all_feats=True)

def ctc(y, label_ctc, label_sar, length, valid): return ctc_loss(y, label_ctc, length)
def sar(y, label_ctc, label_sar, length, valid): return sar_loss(y, label_sar, classes.pad)

def terms(left_out=''):
    "The guide's terms, but for one of `LOSSES`"
    both = ('Student', 'Teacher')
    made = dict(dml_ctc=[Term(dml_paddle, *[f'{n}.head_out.ctc' for n in both], name='dml_ctc')],
        dml_sar=[Term(dml_paddle, *[f'{n}.head_out.sar' for n in both], weight=.5, name='dml_sar')],
        distance=[Term(distance, *[f'{n}.backbone_out' for n in both], name='distance')],
        CTC=[Term(ctc, f'{o}.head_out.ctc', name=f'CTC {o}') for o in both],
        SAR=[Term(sar, f'{o}.head_out.sar', name=f'SAR {o}') for o in both])
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
    def __getitem__(self, idxs): return normalise(self.lines.images[idxs], self.lines.widths[idxs]), *(o[idxs] for o in self.targets)

@torch.no_grad()
def look(nets, data):
    "What both networks make of held-out pictures"
    was = nets.training
    nets.eval()
    x,label,_,length,valid = data[np.arange(len(data))]
    outs = {n: nets[n](x)['head_out'] for n in nets.names}
    texts = {n: [t for t,_ in ctc_decode(o, classes.alphabet, probs=True)] for n,o in outs.items()}
    student,maps = nets['Student'],{n: nets[n].backbone(x) for n in nets.names}
    written = [t for t,_ in sar_decode(student.head.sar_head(maps['Student'], [valid]), classes, probs=True)]
    nets.train(was)
    right = lambda said: sum(a==b for a,b in zip(said, data.lines.words))/len(data)
    a,b = outs.values()
    return dict(exact=right(texts['Student']), exact_teacher=right(texts['Teacher']), exact_sar=right(written), ctc=ctc_loss(outs['Student'].log(), label, length).item(),
        differ=sum(p!=q for p,q in zip(*texts.values()))/len(data), apart=((a-b)*(a.log()-b.log())).sum(-1).mean().item()/2, maps=distance(*maps.values()).item(), size=maps['Student'].square().mean().item())

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
    learn = distill_learner(DataLoaders(dl, WordDL(heldout, bs=2*bs)), dict(Teacher=net(), Student=net()), terms(left_out), cbs=looks, lr=1e-2)
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return dict(seed=seed, epochs=epochs, steps=epochs*len(dl), seconds=round(time.perf_counter()-start, 1), threads=torch.get_num_threads(), rows=looks.rows,
        parts={k: [round(v, 4) for k,v in o.items()] for k,o in learn.parts().groupby(lambda i: i//len(dl)).mean().items()})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    p.add_argument('--runs', nargs='+', default=['all', *LOSSES], help='all five, or what is left out', choices=['all', *LOSSES])
    p.add_argument('--epochs', type=int, default=14)
    p.add_argument('--words', type=int, default=3000)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--out', default='runs/five_losses')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    train = heldout = None
    for seed in a.seeds:
        for left_out in ['' if r=='all' else r for r in a.runs]:
            path = Path(a.out)/f"{'without_'+left_out if left_out else 'all'}_{seed}.json"
            if not path.exists():
                if train is None:
                    words = numbers(a.words+400, 0)
                    train,heldout = Words(words[:a.words], 0),Words(words[a.words:], 1)
                with write_beside(path) as tmp: tmp.write_text(json.dumps(run(left_out, seed, a.epochs, train, heldout)))
            got = json.loads(path.read_text())
            last = got['rows'][-1]
            print(f"{'without '+left_out if left_out else 'all five':16} seed {seed}: student reads {last['exact']:.3f} (SAR head {last['exact_sar']:.3f}), the two differ on {last['differ']:.3f}; {got['seconds']:.0f} s", flush=True)

if __name__=='__main__': main()
