"""Where the time of a training step goes: what `python -m benchmarks` measures.

Each suite is a function that gives rows (dicts). Whatever is compared runs in turns in one process, a round after another, the first round left out;
shown are medians, and the lowest and highest ratio of two turns of one round."""
import gc, subprocess, sys, tempfile, time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
import numpy as np, torch
from torch import nn
from fastai.basics import Callback, CancelValidException, DataLoaders, Learner, OptimWrapper
from fastai.callback.all import GradientAccumulation, ProgressCallback
from torch.utils.checkpoint import checkpoint_sequential
from distillbook.config import build_decoder, build_metric, build_model, build_terms, load_config
from distillbook.core import keep_memory
from distillbook.learner import DistillLearner, distill_learner
from distillbook.losses import kd
from distillbook.nets import Nets, Targets
from distillbook.rec.backbone import MobileNetV1Enhance
from distillbook.rec.labels import Alphabet, SARClasses
from distillbook.rec.losses import ctc_loss
from distillbook.rec.nets import PlainStudent
from distillbook.terms import Term, Terms
from distillbook.use.evaluation import evaluate

CONFIGS = Path(__file__).parents[1]/'configs'
CHARS = [chr(0x4e00+i) for i in range(6623)]


# ---- what is measured

def dictionary():
    "6623 characters a line, as many as ppocr_keys_v1.txt has"
    path = Path(tempfile.gettempdir())/'distillbook_6623.txt'
    path.write_text('\n'.join(CHARS), encoding='utf-8')
    return path


def work(kind, bs=None, frozen=True):
    "Networks, terms, inputs and targets of PP-OCRv3's rec distillation or det CML, random weights and pictures"
    name = dict(rec='rec/ppocrv3_distillation.yml', cml='det/ppocrv3_cml.yml')[kind]
    cfg = load_config(CONFIGS/name, [f'Global.character_dict_path={dictionary()}'] if kind=='rec' else [])
    for m in cfg['Architecture']['Models'].values(): m['pretrained'] = None
    torch.manual_seed(0)
    nets,rng = build_model(cfg),np.random.default_rng(0)
    if kind=='cml':
        bs = bs or 1
        xb = (torch.from_numpy(rng.standard_normal((bs,3,320,320), dtype=np.float32)),)
        yb = tuple(torch.from_numpy((rng.random((4,bs,320,320))>.7).astype(np.float32)))
    else:
        bs,n = bs or 8,6624
        ctc,sar,lengths = np.zeros((bs,25), np.int64),np.full((bs,25), n+2, np.int64),rng.integers(5, 20, bs)
        for i,k in enumerate(lengths):
            ctc[i,:k] = rng.integers(1, n, k)
            sar[i,0],sar[i,1:k+1],sar[i,k+1] = n+1,ctc[i,:k]-1,n+1
        yb = tuple(torch.from_numpy(np.asarray(o)) for o in (ctc, sar, lengths, np.ones(bs)))
        xb = (torch.from_numpy(rng.standard_normal((bs,3,48,320), dtype=np.float32)),)
    return cfg,nets,Terms(nets, build_terms(cfg)),xb,yb


def connected(nets, terms, xb, yb):
    terms.connect((*xb, Targets(yb)) if nets.want_targets() else xb, yb)
    return terms


def bare(nets, terms, xb, yb, opt, amp=False):
    "One step of a plain loop, in its parts, seconds"
    t = [time.perf_counter()]
    inputs = (*xb, Targets(yb)) if nets.want_targets() else xb
    with torch.autocast(xb[0].device.type, torch.bfloat16, enabled=amp): outs = nets(*inputs)
    t.append(time.perf_counter())
    loss = terms(outs, *yb)
    t.append(time.perf_counter())
    loss.backward()
    t.append(time.perf_counter())
    opt.step()
    opt.zero_grad()
    t.append(time.perf_counter())
    return np.diff(t)


def in_turns(fns, rounds, clock=time.perf_counter):
    "Seconds of each function in each round but the first"
    took = {k: [] for k in fns}
    for r in range(rounds+1):
        for k in list(fns)[::1 if r%2 else -1]:
            start = clock()
            fns[k]()
            if r: took[k].append(clock()-start)
    return took


def ratios(took, base):
    "Rows: median seconds, and how they stand to the base's"
    for k,v in took.items():
        each = [a/b for a,b in zip(v, took[base])]
        ratio = dict(ratio=round(median(each), 3), lowest=round(min(each), 3), highest=round(max(each), 3))
        yield dict(what=k, ms=round(median(v)*1e3, 1), **ratio)


# ---- the parts of a step

class Edge(Callback):
    "Notes the time at every event; one before all callbacks, one after"
    run_valid = False
    def __init__(self, order, notes): self.order,self.notes = order,notes
    def __call__(self, event): self.notes.append((event, self.order, time.perf_counter()))

PARTS = dict(before_batch='data', after_pred='forward', after_loss='losses', after_backward='backward', after_step='optimizer')

def split(notes, steps):
    "Seconds a step spends in each part: between the callbacks of two events is the work, and the rest is callbacks"
    parts = dict.fromkeys([*PARTS.values(),'callbacks','rest'], 0.)
    for (a,side,t),(b,_,u) in zip(notes, notes[1:]):
        if side>0 and (a,b) in (('after_batch','before_batch'),): parts['data'] += u-t
        elif side<0: parts['callbacks'] += u-t
        else: parts[PARTS.get(b, 'rest')] += u-t
    return {k: v/steps for k,v in parts.items()}


class NoValid(Callback):
    def before_validate(self): raise CancelValidException


def make_learner(nets, terms, xb, yb, steps, opt_func, cbs=()):
    batches = [(*xb, *yb)]*steps
    dls = DataLoaders(batches, batches[:1])
    dls.n_inp = len(xb)
    learn = distill_learner(dls, nets, terms, opt_func=opt_func, lr=1e-3, wd=0., cbs=[NoValid(), *cbs])
    learn.remove_cbs(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def steps(rounds=7, **_):
    "A step of the two full configurations through the learner, part by part, and each network's forward"
    for kind in ('rec','cml'):
        cfg,nets,terms,xb,yb = work(kind)
        nets.to(memory_format=torch.channels_last)
        xb = tuple(x.to(memory_format=torch.channels_last) for x in xb)
        notes,each = [],{n: 0. for n in nets.names}
        learn = make_learner(nets, build_terms(cfg), xb, yb, rounds, partial(OptimWrapper, opt=partial(torch.optim.Adam, fused=True)))
        with learn.no_bar(): learn.fit(1)
        for n in nets.names:
            nets[n].register_forward_pre_hook(lambda m,a,n=n: each.update({n: each[n]-time.perf_counter()}))
            nets[n].register_forward_hook(lambda m,a,o,n=n: each.update({n: each[n]+time.perf_counter()}))
        learn.add_cbs([Edge(-1000, notes), Edge(1000, notes)])
        learn.fit(1)
        inside = notes[next(i for i,o in enumerate(notes) if o[0]=='before_batch'):]
        parts = split(inside[:max(i for i,o in enumerate(inside) if o[0]=='after_batch')+1], rounds)
        for k,v in [*parts.items(), *((f'forward of {n}', v/rounds) for n,v in each.items())]: yield dict(config=kind, part=k, ms=round(v*1e3, 2))


# ---- the learner against a bare loop

def students(n, bs=32):
    "n small recognisers that teach each other, and a batch"
    torch.manual_seed(0)
    nets = {f'Net{i}': PlainStudent(63).to(memory_format=torch.channels_last) for i in range(n)}
    x,y,l = torch.randn(bs,3,48,160),torch.randint(1, 63, (bs,20)),torch.full((bs,), 8)
    return nets,[Term(ctc_loss, n) for n in nets],(x,),(y,l)


def one_step(learn, xb, yb):
    "A function that takes a step inside a fit that goes on: the learner's own loop, stopped at every batch"
    done = []
    class Watch(Callback):
        order = 999
        def after_batch(self):
            if self.training: done.append(time.perf_counter())
    learn.add_cb(Watch())
    def run(steps):
        done.clear()
        learn.dls = DataLoaders([(*xb, *yb)]*(steps+1), [(*xb, *yb)])
        learn.dls.n_inp = len(xb)
        learn.fit(1)
        return np.diff(done).tolist()
    return run


def learner(rounds=7, **_):
    "Steps of distill_learner beside steps of a bare loop with the same networks, losses and optimiser; and three networks beside three times one"
    block = 8
    cases = {'rec (2 nets, full size)': None, 'small recogniser': 1, '3 small recognisers': 3}
    for name,n in cases.items():
        if n is None:
            cfg,nets,terms,xb,yb = work('rec')
            own = build_terms(cfg)
            nets.to(memory_format=torch.channels_last)
        else:
            nets,own,xb,yb = students(n)
            nets = Nets(nets)
        b = 2 if n is None else block
        opt_func = partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))
        learn = make_learner(nets, own, xb, yb, 2, opt_func)
        run = one_step(learn, xb, yb)
        terms = connected(nets, Terms(nets, own), xb, yb)
        opt = torch.optim.AdamW([p for p in nets.parameters() if p.requires_grad], lr=1e-3, weight_decay=0., fused=True)
        took = dict(bare=[], learner=[])
        nets.train()
        for r in range(rounds+1):
            a = [sum(bare(nets, terms, xb, yb, opt)) for _ in range(b)]
            c = run(b)
            nets.train()
            if not r: continue
            took['bare'].append(median(a))
            took['learner'].append(median(c))
        for row in ratios(took, 'bare'): yield dict(case=name, **row)
    nets,own,xb,yb = students(3)
    singles = [(Nets({k: v}), [t for t in own if t.addresses[0]==k]) for k,v in nets.items()]
    together,terms,*_ = students(3)
    runs = [one_step(make_learner(n, t, xb, yb, 2, opt_func), xb, yb) for n,t in [(Nets(together), terms), *singles]]
    took = {'sum of three alone': [], 'three in one learner': []}
    for r in range(rounds+1):
        one,*rest = [median(run(block)) for run in runs]
        if not r: continue
        took['three in one learner'].append(one)
        took['sum of three alone'].append(sum(rest))
    for row in ratios(took, 'sum of three alone'): yield dict(case='3 networks', **row)


# ---- what makes a step quicker

def accumulated(nets, terms, xb, yb, opt, parts):
    def run():
        for i in range(parts):
            n = len(xb[0])//parts
            x,y = [[o[i*n:(i+1)*n] for o in os] for os in (xb, yb)]
            (terms(nets(*x, *([Targets(y)] if nets.want_targets() else [])), *y)/parts).backward()
        opt.step()
        opt.zero_grad()
    return run


def recomputed(net):
    "A backbone whose blocks forget what they gave and compute it again in the backward step"
    blocks,head,pool = net.block_list,net.conv1,net.pool
    net.forward = lambda x: pool(checkpoint_sequential(blocks, 4, head(x), use_reentrant=False))


def variant(kind, channels_last=False, fused=False, bf16=False, spare=False, teacher=False, compiled=False, recompute=False, parts=None):
    cfg,nets,terms,xb,yb = work(kind)
    if teacher: nets.bf16 = set(nets.frozen)
    connected(nets, terms, xb, yb)
    if channels_last:
        nets.to(memory_format=torch.channels_last)
        xb = tuple(x.to(memory_format=torch.channels_last) for x in xb)
    if spare:
        from distillbook.learner import Float32Conv
        for m in nets.modules():
            if type(m) is nn.Conv2d and m.groups>1: m.__class__ = Float32Conv
    if compiled:
        for n in nets.names: (nets[n] if n in nets.frozen or kind=='cml' else nets[n].backbone).compile()
    if recompute:
        for n in nets.names: recomputed(nets[n].backbone)
    opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-3, **(dict(fused=True) if fused else dict(foreach=False)))
    nets.train()
    if parts: return accumulated(nets, terms, xb, yb, opt, parts)
    return lambda: bare(nets, terms, xb, yb, opt, bf16)


def tricks(rounds=7, compile=False, **_):
    "A bare step of the full configurations, in its plainest form and in others"
    quick = dict(channels_last=True, fused=True)
    for kind in ('rec','cml'):
        variants = {'plain': {}, 'fused Adam': dict(fused=True), 'channels_last': dict(channels_last=True), 'both (ours)': quick}
        if kind=='rec': variants |= {'ours, two half batches': dict(quick, parts=2), 'ours, recomputing': dict(quick, recompute=True)}
        if kind=='cml': variants |= {'ours, teacher in bf16': dict(quick, teacher=True)}
        variants |= {'ours, bf16': dict(quick, bf16=True), 'ours, bf16 but depthwise': dict(quick, bf16=True, spare=True)}
        if compile: variants |= {'ours, compiled': dict(quick, compiled=True)}
        fns = {k: variant(kind, **v) for k,v in variants.items()}
        for row in ratios(in_turns(fns, rounds), 'plain'): yield dict(config=kind, **row)
        del fns
        gc.collect()


def quicker(rounds=7, **_):
    "A bare step with quicker gradients of wide depthwise kernels, and with a teacher asked for what is read; and the teacher's forward. Seconds are this process's own, so use one thread"
    from distillbook.cache import folded
    from distillbook.depthwise import quick_depthwise
    for kind in ('rec','cml'):
        cfg,nets,terms,xb,yb = work(kind)
        nets.to(memory_format=torch.channels_last)
        connected(nets, terms, xb, yb)
        opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-3, fused=True)
        brief = set(nets.train().brief)
        def way(pairs, asked):
            nets.brief = asked
            with quick_depthwise(nets) if pairs else nullcontext(): bare(nets, terms, xb, yb, opt)
        fns = {'as before': partial(way, False, set()), 'gradients by pairs': partial(way, True, set())}
        if brief: fns |= {'teacher asked less': partial(way, False, brief), 'both': partial(way, True, brief)}
        for row in ratios(in_turns(fns, rounds, time.process_time), 'as before'): yield dict(what_is=f'{kind}, a step', **row)
    quick = folded(nets['Teacher'].eval())
    def forward(net, whole):
        with torch.no_grad(): net(*xb, whole=whole)
    fns = {'asked for all': partial(forward, nets['Teacher'], True), 'asked for one map': partial(forward, nets['Teacher'], False), 'and BatchNorm folded': partial(forward, quick, False)}
    for row in ratios(in_turns(fns, rounds, time.process_time), 'asked for all'): yield dict(what_is='cml, the teacher', **row)


def doubled(m):
    "Two copies of a network of convolutions side by side in one, as groups"
    for name,c in m.named_children():
        if isinstance(c, nn.Conv2d): setattr(m, name, nn.Conv2d(2*c.in_channels, 2*c.out_channels, c.kernel_size, c.stride, c.padding, groups=2*c.groups, bias=c.bias is not None))
        elif isinstance(c, nn.BatchNorm2d): setattr(m, name, nn.BatchNorm2d(2*c.num_features))
        else: doubled(c)
    return m


def twins(rounds=7, **_):
    "Two backbones one after the other beside both in one network of groups, forward and backward"
    x = torch.randn(8,3,48,320).to(memory_format=torch.channels_last)
    new = lambda: MobileNetV1Enhance(last_conv_stride=(1,2), last_pool_type='avg', last_pool_kernel_size=(2,2))
    a,b,both = [o.to(memory_format=torch.channels_last).train() for o in (new(), new(), doubled(new()))]
    fns = {'one after the other': lambda: (a(x).sum()+b(x).sum()).backward(), 'as groups': lambda: both(torch.cat([x,x], 1)).sum().backward()}
    for row in ratios(in_turns(fns, rounds), 'one after the other'): yield row


def sparse_ctc(logits, labels, lengths):
    "ctc_loss with one class for all that is not in a label: the same number, from [T,N,L+2] in place of [T,N,C]"
    x = logits.float()
    first = (labels[:,:,None]==labels[:,None]).int().argmax(-1)
    own = (first==torch.arange(labels.shape[1])) & (labels>0)
    at = torch.cat([torch.zeros_like(labels[:,:1]), labels], 1)[:,None].expand(-1, x.shape[1], -1)
    seen = x.gather(-1, at).masked_fill(~torch.cat([own[:,:1]|True, own], 1)[:,None], -1e4)
    rest = x.scatter(-1, at, float('-inf')).logsumexp(-1, keepdim=True)
    logp = torch.cat([seen, rest], -1).log_softmax(-1).transpose(0, 1)
    return nn.functional.ctc_loss(logp, first+1, torch.full_like(lengths, len(logp)), lengths, reduction='none', zero_infinity=True).mean()


def ctc(rounds=7, **_):
    "CTC over 6625 classes, and over those in the label with one for the rest; forward and backward"
    for n in (8,128):
        torch.manual_seed(0)
        x,l = torch.randn(n,40,6625,requires_grad=True),torch.randint(3, 20, (n,))
        y = torch.randint(1, 6625, (n,25)).masked_fill(torch.arange(25)>=l[:,None], 0)
        grads = [torch.autograd.grad(f(x, y, l), x)[0] for f in (ctc_loss, sparse_ctc)]
        assert (grads[0]-grads[1]).abs().max() < 1e-4*grads[0].abs().max()
        fns = {k: partial(lambda f: torch.autograd.grad(f(x, y, l), x), f) for k,f in {'all classes': ctc_loss, 'those in the label': sparse_ctc}.items()}
        for row in ratios(in_turns(fns, rounds), 'all classes'): yield dict(batch=n, **row)


# ---- what a frozen teacher costs

def teacher(rounds=7, **_):
    "A step with a frozen teacher less a step without, beside the teacher's forward alone; and the memory of both"
    def make(with_teacher):
        cfg,nets,terms,xb,yb = work('cml')
        nets.to(memory_format=torch.channels_last)
        own = [t for t in build_terms(cfg) if with_teacher or not any(a.startswith('Teacher') for a in t.addresses)]
        if not with_teacher: nets = Nets({n: nets[n] for n in nets.names if n!='Teacher'})
        terms = connected(nets, Terms(nets, own), xb, yb)
        opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-3, fused=True)
        nets.train()
        return nets,xb,lambda: bare(nets, terms, xb, yb, opt)
    nets,xb,full = make(True)
    alone,frozen = make(False)[2],nets['Teacher'].eval()
    def forward():
        with torch.no_grad(): frozen(*xb)
    took = in_turns({'students': alone, 'students and teacher': full, 'teacher, forward': forward}, rounds)
    extra = [(b-a)/t for a,b,t in zip(*took.values())]
    for k,v in took.items(): yield dict(what=k, ms=round(median(v)*1e3, 1))
    yield dict(what='the teacher costs, in its forwards', ratio=round(median(extra), 3), lowest=round(min(extra), 3), highest=round(max(extra), 3))
    peaks = {k: int(subprocess.run([sys.executable, '-m', 'benchmarks.speed', k], capture_output=True, text=True, check=True).stdout) for k in ('without','with')}
    weights = sum(p.numel()*4 for p in frozen.parameters())
    yield dict(what='peak memory: with the teacher over (students alone + its weights)', MB=round(peaks['with']/2**20), of=round((peaks['without']+weights)/2**20), ratio=round(peaks['with']/(peaks['without']+weights), 3))


def high_water():
    "Bytes that this process has held at most (Linux; getrusage would count what its parent held before exec)"
    return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith('VmHWM'))


def peak(which, steps=3):
    "Bytes that networks and training take at most, beyond what the process had before"
    before = high_water()
    cfg,nets,terms,xb,yb = work('cml', bs=8)
    if which=='without': nets = Nets({n: nets[n] for n in nets.names if n!='Teacher'})
    own = [t for t in build_terms(cfg) if which=='with' or not any(a.startswith('Teacher') for a in t.addresses)]
    terms = connected(nets, Terms(nets, own), tuple(x[:1] for x in xb), tuple(y[:1] for y in yb))
    opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-3, fused=True)
    nets.train()
    for _ in range(steps): bare(nets, terms, xb, yb, opt)
    return high_water()-before


# ---- using what was trained

def evaluation(rounds=5, **_):
    "An evaluation of two recognisers and of three detectors: the one forward per batch, and all the rest"
    for kind,bs in (('rec',32),('cml',4)):
        cfg,nets,_,xb,yb = work(kind, bs)
        cfg['PostProcess']['model_name'] = nets.names
        rng = np.random.default_rng(0)
        if kind=='cml': batch = (xb[0], torch.tensor([[320.,320.,1.,1.]]*bs), [np.array([[[20,20],[120,20],[120,60],[20,60]]], np.float32)]*bs, [np.array([False])]*bs)
        else: batch = (xb[0], yb[0])
        decode,metric,calls = build_decoder(cfg),build_metric(cfg),[]
        hooks = [nets[n].register_forward_hook(lambda *_: calls.append(1)) for n in nets.names]
        nets.eval()
        def forward():
            with torch.no_grad(): nets(batch[0])
        took = in_turns({'forward of all networks': forward, 'evaluation': lambda: evaluate(nets, [batch], decode, metric)}, rounds)
        for row in ratios(took, 'forward of all networks'): yield dict(config=kind, **row)
        calls.clear()
        evaluate(nets, [batch]*3, decode, metric)
        yield dict(config=kind, what='forwards per network and batch', ratio=len(calls)/3/len(nets.names))


def inference(rounds=9, **_):
    "A picture at a time and many, milliseconds each, of networks as they are trained and with BatchNorm folded in"
    from distillbook.cache import folded
    torch.manual_seed(0)
    nets = {'small recogniser': PlainStudent(63)}
    for kind,name in (('rec','Student'),('cml','Student'),('cml','Teacher')): nets[f'PP-OCRv3 {kind} {name}'] = work(kind)[1][name]
    for name,net in nets.items():
        net = net.eval().to(memory_format=torch.channels_last)
        for bs in (1,8):
            x = torch.randn(bs,3,*((320,320) if 'cml' in name else (48,160) if 'small' in name else (48,320))).to(memory_format=torch.channels_last)
            quick = folded(net)
            def run(net):
                with torch.no_grad(): net(x)
            for row in ratios(in_turns({'as trained': partial(run, net), 'folded': partial(run, quick)}, rounds), 'as trained'): yield dict(net=name, batch=bs, **{**row, 'ms': round(row['ms']/bs, 2)})


def memory(rounds=5, **_):
    "A step where the C library gives memory back, and where `keep_memory` has told it not to; a process each, in turns"
    took = {k: [] for k in ('given back, rec','kept, rec','given back, 3 small','kept, 3 small')}
    for _ in range(min(rounds, 5)):
        for k in took: took[k].append(float(subprocess.run([sys.executable, '-m', 'benchmarks.speed', 'step', k, str(torch.get_num_threads())], capture_output=True, text=True, check=True).stdout))
    for case in ('rec','3 small'):
        for row in ratios({k: took[f'{k}, {case}'] for k in ('given back','kept')}, 'given back'): yield dict(case=case, **row)


def one_process(what):
    "Median seconds of a step, in a process of its own"
    if what.startswith('kept'): keep_memory()
    if what.endswith('rec'):
        _,nets,terms,xb,yb = work('rec')
        nets.to(memory_format=torch.channels_last)
    else:
        nets,own,xb,yb = students(3)
        terms = Terms(nets := Nets(nets), own)
    connected(nets, terms, xb, yb)
    opt = torch.optim.Adam([p for p in nets.parameters() if p.requires_grad], lr=1e-3, fused=True)
    nets.train()
    return median([sum(bare(nets, terms, xb, yb, opt)) for _ in range(8)][3:])


SUITES = dict(steps=steps, learner=learner, tricks=tricks, quicker=quicker, twins=twins, ctc=ctc, teacher=teacher, evaluation=evaluation, inference=inference, memory=memory)

if __name__=='__main__':
    import warnings
    warnings.simplefilter('ignore')
    torch.set_num_threads(int(sys.argv[3]) if sys.argv[1]=='step' else 1)
    print(one_process(sys.argv[2]) if sys.argv[1]=='step' else peak(sys.argv[1]))
