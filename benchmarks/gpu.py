"""A training step on a GPU: in its plain form, recorded, compiled, both; beside the learner, from files, and 500 times over. One command, at most four minutes:

    python -m benchmarks.gpu [--json FILE] [--seconds 230] [--jobs NAME ...]

PP-OCRv3's rec distillation (two networks, 128 lines of 48 x 320, 6625 classes) and det CML (two students, a frozen teacher, 8 pages of 960 x 960), random weights
and pictures. All ways of taking a step run in turns on the same networks; `plain` is PyTorch as it is, `ratio` the median over rounds of the time over plain's.

    ms          between two steps that follow one another, nothing waited for in between
    host ms     what Python needs for a step, until it has launched everything
    launches    kernels, copies and fills on the GPU; `calls`, how often the host asked for something
    busy        the share of the time in which the GPU did something (torch.profiler)
    peak GB     allocated at most

Each job runs in a process that is begun anew when a job breaks it or hangs; what breaks is recorded with its error, and the others go on. `--small --device cpu`
runs everything on tiny networks without a GPU, with the tape of the chapter on graphs in place of CUDA's, and says only that the program works."""
import argparse, json, os, subprocess, sys, tempfile, threading, time, traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from string import ascii_letters, digits
from statistics import median

if __name__=='__main__' and '--device' in sys.argv and 'cpu' in sys.argv: os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, torch
from distillbook.config import build_model, build_terms, load_config
from distillbook.graphs import Launches, Runner, compile_blocks, cuda_record, record_net
from distillbook.nets import Targets
from distillbook.terms import Terms

CONFIGS = Path(__file__).parents[1]/'configs'
DTYPES = dict(fp32=None, bf16=torch.bfloat16, fp16=torch.float16)


# ---- the two workloads

def shrunk(cfg, kind):
    "The same configuration with networks for a test"
    for m in cfg['Architecture']['Models'].values():
        if kind=='rec':
            m['Backbone']['scale'] = .0625
            for head in m['Head']['head_list']:
                if 'CTCHead' in head: head['CTCHead']['Neck'] |= dict(dims=8, depth=1, hidden_dims=16)
                if 'SARHead' in head: head['SARHead'] |= dict(enc_dim=16, d_k=8)
        elif m['Backbone']['name']=='MobileNetV3': m['Backbone'] |= dict(scale=.25, model_name='small')
        else: m |= dict(Backbone=dict(name='PlainBackbone', channels=[8,8,16,16]), Neck=dict(name='DBFPN', out_channels=16))
    for row in cfg['Train']['dataset']['transforms']:
        if 'EastRandomCropData' in row: row['EastRandomCropData']['size'] = [64,64]


def configured(kind, small, *more):
    "The configuration, without weights to be downloaded"
    chars = [*ascii_letters, *digits, *(chr(0x4e00+i) for i in range(0 if small else 6561))]
    path = Path(tempfile.gettempdir())/f'distillbook_{len(chars)}.txt'
    path.write_text('\n'.join(chars), encoding='utf-8')
    name = dict(rec='rec/ppocrv3_distillation.yml', cml='det/ppocrv3_cml.yml')[kind]
    cfg = load_config(CONFIGS/name, [*([f'Global.character_dict_path={path}'] if kind=='rec' else []), *more])
    for m in cfg['Architecture']['Models'].values(): m['pretrained'] = None
    if small: shrunk(cfg, kind)
    return cfg,len(chars)


def batch_of(kind, small, n_chars):
    "Inputs and targets"
    rng = np.random.default_rng(0)
    if kind=='cml':
        n,side = (2,64) if small else (8,960)
        maps = (rng.random((4,n,side,side), dtype=np.float32)>.7).astype(np.float32)
        return (torch.from_numpy(rng.standard_normal((n,3,side,side), dtype=np.float32)),),tuple(torch.from_numpy(maps))
    n,width,last = (2,64,n_chars+1) if small else (128,320,n_chars+1)
    most = 4 if small else 20
    ctc,sar,lengths = np.zeros((n,25), np.int64),np.full((n,25), last+2, np.int64),rng.integers(2, most, n)
    for i,k in enumerate(lengths):
        ctc[i,:k] = rng.integers(1, last, k)
        sar[i,0],sar[i,1:k+1],sar[i,k+1] = last+1,ctc[i,:k]-1,last+1
    yb = tuple(torch.from_numpy(np.asarray(o)) for o in (ctc, sar, lengths, np.ones(n)))
    return (torch.from_numpy(rng.standard_normal((n,3,48,width), dtype=np.float32)),),yb


class Work:
    "Networks, terms, optimiser and a batch, on the device; `step` takes a step in one way"
    def __init__(self, kind, precision, o, memory_format=torch.channels_last):
        cfg,n_chars = configured(kind, o.small)
        torch.manual_seed(0)
        self.kind,self.precision,self.device = kind,precision,torch.device(o.device)
        self.nets = build_model(cfg)
        for p in self.nets.parameters():
            if p.ndim==4: p.data = p.data.to(memory_format=memory_format)
        self.nets.to(self.device)
        xb,yb = batch_of(kind, o.small, n_chars)
        self.xb = tuple(x.to(self.device).contiguous(memory_format=memory_format) for x in xb)
        self.yb = tuple(y.to(self.device) for y in yb)
        self.inputs = (*self.xb, Targets(self.yb)) if self.nets.want_targets() else self.xb
        self.terms = Terms(self.nets, build_terms(cfg))
        self.terms.connect(self.inputs, self.yb)
        self.params = [p for p in self.nets.parameters() if p.requires_grad]
        self.opt = torch.optim.Adam(self.params, lr=1e-4, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision=='fp16')
        self.nets.train()

    def step(self):
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None): outs = self.nets(*self.inputs)
        self.loss = self.terms(outs, *self.yb)
        self.scaler.scale(self.loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad()


def sync(device):
    if torch.device(device).type=='cuda': torch.cuda.synchronize()


# ---- ways of taking a step

class Way:
    "One of the ways; `with way:` the networks of a `Work` go it"
    def __init__(self, work, record=False, compiled=False, depthwise=False, streams=True, benchmark=False):
        self.work,self.depthwise,self.benchmark = work,depthwise,benchmark
        on_gpu = work.device.type=='cuda'
        recorder = (cuda_record if on_gpu else record_net) if record else None
        blocks = partial(compile_blocks, backend='inductor' if on_gpu else 'eager') if compiled else None
        self.runner = Runner(recorder, streams and on_gpu, compiled=blocks) if record or compiled else None

    def __enter__(self):
        self.work.nets.runner = self.runner
        self.layers = nullcontext() if not self.depthwise else triton_layers(self.work.nets)
        self.layers.__enter__()
        torch.backends.cudnn.benchmark = self.benchmark
        return self

    def __exit__(self, *_):
        self.work.nets.runner = None
        self.layers.__exit__(None, None, None)
        torch.backends.cudnn.benchmark = False

    def failed(self):
        "Why this way is not what it is called"
        if self.runner is None: return None
        said = [*self.runner.said]
        if self.runner.gave_up: said.append(self.runner.gave_up)
        return '; '.join(said) or None

    def close(self):
        if self.runner: self.runner.close()


def triton_layers(nets):
    "Depthwise convolutions by Triton, if they compute here what PyTorch's do"
    from benchmarks.depthwise import check, triton_depthwise
    global wrong
    if wrong is None: wrong = check('cuda')
    if not wrong<1e-4: raise RuntimeError(f"Triton's depthwise convolutions are {wrong:.2g} from PyTorch's")
    return triton_depthwise(nets)

wrong = None # How far Triton's are from PyTorch's, once that is known


def block_of(way, n):
    "Seconds a step, of n that follow one another"
    with way:
        sync(way.work.device)
        start = time.perf_counter()
        for _ in range(n): way.work.step()
        sync(way.work.device)
        return (time.perf_counter()-start)/n


def host_ms(way, n=5):
    "What the host needs for a step, each begun with nothing left to do"
    took = []
    with way:
        for _ in range(n):
            sync(way.work.device)
            start = time.perf_counter()
            way.work.step()
            took.append(time.perf_counter()-start)
        sync(way.work.device)
    return round(median(took)*1e3, 2)


def union(spans):
    "The length of the union of intervals"
    total,end = 0,-1
    for a,b in sorted(spans):
        if b>end: total,end = total+b-max(a, end),b
    return total


def profiled(step, device, n=2):
    "What the GPU was given in some steps, and how long it was busy with it"
    if torch.device(device).type!='cuda':
        with Launches() as seen: step()
        return dict(launches=seen.total)
    prof = begun_profile()
    for _ in range(n): step()
    return gpu_time(prof, device, n)


def begun_profile():
    from torch.profiler import ProfilerActivity, profile
    torch.cuda.synchronize()
    prof = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    prof.__enter__()
    return prof


def gpu_time(prof, device, n):
    "What stands in a profile of n steps"
    sync(device)
    prof.__exit__(None, None, None)
    events = [(str(e.device_type()), e.name(), e.start_ns(), e.duration_ns()) for e in prof.profiler.kineto_results.events()]
    on_gpu = [o for o in events if o[0].endswith('CUDA')]
    asked = [name for device,name,*_ in events if not device.endswith('CUDA') and name.startswith('cuda')]
    spans,names = [(start, start+took) for *_,start,took in on_gpu],{}
    for _,name,_,took in on_gpu: names[name] = names.get(name, 0)+took
    whole = max(b for _,b in spans)-min(a for a,_ in spans)
    first = sorted(names.items(), key=lambda o: -o[1])[:8]
    calls = sum(any(k in name for k in ('Launch','Memcpy','Memset')) for name in asked)
    return dict(launches=len(on_gpu)//n, calls=calls//n, waits=round((sum('Synchronize' in name for name in asked)-1)/n, 1), gpu_ms=round(union(spans)/n/1e6, 2),
        busy=round(union(spans)/whole, 3), kernels={k[:60]: round(v/n/1e6, 2) for k,v in first})


def measured(work, ways, o, rounds=4, seconds=2.5):
    "Rows: each way beside the first, in turns"
    took,rows,alive = {},{},dict(ways)
    on_gpu = work.device.type=='cuda'
    for name,way in ways.items():
        rows[name] = dict(kind=work.kind, precision=work.precision, way=name)
        start = time.perf_counter()
        try:
            if on_gpu: torch.cuda.reset_peak_memory_stats()
            block_of(way, 5)
            rows[name]['first_s'] = round(time.perf_counter()-start, 1)
            rows[name]['host_ms'] = host_ms(way, 2 if o.small else 5)
            if on_gpu or way.runner is None:
                with way: rows[name] |= profiled(way.work.step, work.device)
            if on_gpu: rows[name]['peak_GB'] = round(torch.cuda.max_memory_allocated()/2**30, 2)
            if way.failed(): rows[name]['fell_back'] = way.failed()
            if not bool(way.work.loss.isfinite()): rows[name]['error'] = f'the loss is {way.work.loss.item()}'
        except Exception as e:
            rows[name]['error'] = error_of(e)
            del alive[name]
            if on_gpu: torch.cuda.empty_cache()
    if alive: n = max(1, int(seconds/len(alive)/rounds/max(block_of(w, 1) for w in alive.values())))
    for r in range(rounds if alive else 0):
        for name in list(alive)[::1 if r%2 else -1]: took.setdefault(name, []).append(block_of(alive[name], 1 if o.small else n))
    base = took.get(next(iter(ways)))
    for name,v in took.items():
        rows[name] |= dict(ms=round(median(v)*1e3, 2), samples_s=round(len(work.xb[0])/median(v), 1))
        if not base: continue
        each = [a/b for a,b in zip(v, base)]
        rows[name] |= dict(ratio=round(median(each), 3), lowest=round(min(each), 3), highest=round(max(each), 3))
    for way in ways.values(): way.close()
    return list(rows.values())


def error_of(e):
    lines = [l.strip() for l in str(e).splitlines() if l.strip()]
    return f'{type(e).__name__}: {lines[0] if lines else ""}'[:300]


# ---- the jobs

def ways_of(work):
    ways = {'plain': Way(work), 'recorded': Way(work, record=True, streams=False), 'recorded, a stream each': Way(work, record=True)}
    return ways | ({'recorded, depthwise by Triton': Way(work, record=True, depthwise=True)} if work.device.type=='cuda' else {})


def steps(kind, precision, o):
    "A bare step, plain and recorded"
    work = Work(kind, precision, o)
    return measured(work, ways_of(work), o)


def compiled(kind, precision, o):
    "A bare step with compiled blocks, alone and recorded; `first_s` holds the compiling"
    work = Work(kind, precision, o)
    ways = {'plain': Way(work), 'compiled': Way(work, compiled=True), 'compiled and recorded': Way(work, record=True, compiled=True)}
    return measured(work, ways, o)


def layout(kind, precision, o):
    "Channels first, in place of last; and cuDNN's search for the quickest algorithm"
    rows = []
    for name,memory,benchmark in (('channels last', torch.channels_last, False), ('channels first', torch.contiguous_format, False), ('channels last, cudnn.benchmark', torch.channels_last, True)):
        work = Work(kind, precision, o, memory)
        rows += measured(work, {name: Way(work, record=True, benchmark=benchmark)}, o, rounds=2, seconds=1)
        del work
        if o.device=='cuda': torch.cuda.empty_cache()
    return rows


def learner(kind, precision, o):
    "Steps of `distill_learner` beside a bare loop's, both as they are by default"
    from fastai.basics import OptimWrapper
    from benchmarks.speed import make_learner, one_step
    work = Work(kind, precision, o)
    opt_func = partial(OptimWrapper, opt=partial(torch.optim.Adam, fused=True))
    learn = make_learner(work.nets, work.terms.terms, work.xb, work.yb, 2, opt_func)
    if precision=='bf16' and o.device=='cuda': learn.to_bf16()
    if o.device!='cuda': learn.quick_steps.record = record_net
    way,run,took = Way(work, record=True),one_step(learn, work.xb, work.yb),dict(bare=[], learner=[])
    n = 4 if o.small else 25
    block_of(way, 6)
    for r in range(2 if o.small else 4):
        work.nets.train()
        took['bare'].append(block_of(way, n))
        took['learner'].append(float(np.sum(run(n+6)[6:])/n))
    each = [a/b for a,b in zip(took['learner'], took['bare'])]
    row = dict(kind=kind, precision=precision, bare_ms=round(median(took['bare'])*1e3, 2), learner_ms=round(median(took['learner'])*1e3, 2))
    return [row | dict(ratio=round(median(each), 3), lowest=round(min(each), 3), highest=round(max(each), 3))]


def long(kind, precision, o):
    "Many steps, and whether anything became NaN"
    work,n,most = Work(kind, precision, o),6 if o.small else 500,40
    with Way(work, record=True) as way:
        start,losses = time.perf_counter(),[]
        for i in range(n):
            work.step()
            losses.append(work.loss.detach().clone())
            if i%50==49 and time.perf_counter()-start>most: break
        sync(o.device)
    finite = torch.stack(losses).isfinite().all().item() and all(p.isfinite().all().item() for p in work.params)
    skipped = work.scaler.get_scale() if precision=='fp16' else None
    return [dict(kind=kind, precision=precision, steps=len(losses), finite=finite, first=round(losses[0].item(), 3), last=round(losses[-1].item(), 3), scale=skipped,
        seconds=round(time.perf_counter()-start, 1), fell_back=way.failed())]


class Backbones:
    "Two of PP-OCRv3's recognition backbones, or both in one network of groups; `step` goes forward and back"
    kind = 'twins'
    def __init__(self, grouped, precision, o):
        from benchmarks.speed import doubled
        from distillbook.nets import Nets
        from distillbook.rec.backbone import MobileNetV1Enhance
        def new(): return MobileNetV1Enhance(scale=.125 if o.small else .5, last_conv_stride=(1,2), last_pool_type='avg', last_pool_kernel_size=(2,2))
        torch.manual_seed(0)
        self.precision,self.device = precision,torch.device(o.device)
        self.nets = Nets(dict(Both=doubled(new())) if grouped else dict(A=new(), B=new())).to(self.device, memory_format=torch.channels_last).train()
        x = torch.randn(2 if o.small else 128, 3, 48, 64 if o.small else 320)
        self.xb = (torch.cat([x,x], 1) if grouped else x).to(self.device, memory_format=torch.channels_last),

    def step(self):
        dtype = DTYPES[self.precision]
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None): outs = self.nets(*self.xb)
        self.loss = sum(v.float().square().mean() for v in outs.values())
        self.loss.backward()
        for p in self.nets.parameters(): p.grad = None


def twins(precision, o):
    "Two networks of one design beside both in one network of groups"
    two,one = Backbones(False, precision, o),Backbones(True, precision, o)
    rows = measured(two, {'one after the other': Way(two), 'recorded, a stream each': Way(two, record=True), 'as groups': Way(one), 'as groups, recorded': Way(one, record=True)}, o)
    for row in rows: row.pop('peak_GB', None) # It would be that of both
    return rows


def files(kind, precision, o):
    "A run from files, as `distillbook train` does it: samples a second, how long the loop waits for them, and how busy the GPU is"
    from benchmarks.loaders import make_page_files, make_words_files
    from distillbook.config import build_learner
    folder = Path(tempfile.mkdtemp())
    n,bs = (16,2) if o.small else dict(rec=(1500,128), cml=(60,8))[kind]
    (make_words_files if kind=='rec' else make_page_files)(folder, n)
    lines = (folder/'list.txt').read_text()
    (folder/'few.txt').write_text('\n'.join(lines.split('\n')[:bs]))
    (folder/'list.txt').write_text('\n'.join([lines]*(1 if o.small else 20)))
    workers = 0 if o.small else max(1, (os.cpu_count() or 2)-2)
    data = [f'{s}.{k}' for s,name in (('Train','list'), ('Eval','few')) for k in (f'dataset.data_dir={folder}', f'dataset.label_file_list=[{folder}/{name}.txt]')]
    own = [f'Train.loader.num_workers={workers}', 'Eval.loader.num_workers=0', f'Train.loader.batch_size_per_card={bs}', f'Global.save_model_dir={folder}/out', 'Global.epoch_num=4',
        f"Global.use_gpu={'true' if o.device=='cuda' else 'false'}", 'Global.cal_metric_during_train=false']
    if precision!='fp32' and o.device=='cuda': own += ['Global.use_amp=true', f"Global.amp_dtype={dict(bf16='bfloat16', fp16='float16')[precision]}"]
    if kind=='cml' and o.small: own += ['Train.loader.drop_last=true']
    cfg,_ = configured(kind, o.small, *data, *own)
    learn,seen = build_learner(cfg),watch(warm=2 if o.small else 12, seconds=.5 if o.small else 9, device=o.device)
    learn.add_cb(seen)
    learn.fit(4)
    return [dict(kind=kind, precision=precision, workers=workers, batch=bs) | seen.found()]


def watch(warm, seconds, device):
    "A callback that times the steps after the first ones, then looks at four with the profiler, and ends the fit"
    from fastai.basics import Callback, CancelFitException
    class Watching(Callback):
        order,run_valid = 70,False
        n,waited,asked,start,took,prof,busy = 0,0.,None,None,None,None,{}
        def before_batch(self):
            if self.start is not None and self.took is None: self.waited += time.perf_counter()-self.asked

        def after_batch(self):
            self.n += 1
            if self.n==warm: self.begin()
            elif self.took is None and self.start is not None and time.perf_counter()-self.start>seconds: self.end()
            elif self.took is not None and self.n==self.steps+4:
                if self.prof: self.busy = gpu_time(self.prof, device, 4)
                raise CancelFitException
            self.asked = time.perf_counter()

        def begin(self):
            sync(device)
            self.start = time.perf_counter()

        def end(self):
            sync(device)
            self.took,self.steps,self.bs = time.perf_counter()-self.start,self.n,len(self.xb[0])
            if device=='cuda': self.prof = begun_profile()

        def found(self):
            n = self.steps-warm
            return dict(steps=n, ms=round(self.took/n*1e3, 1), samples_s=round(n*self.bs/self.took, 1), waiting=round(self.waited/self.took, 3)) | self.busy
    return Watching()


JOBS = { # Name to a function of the options and the seconds that it may take; the most important ones first
    'rec bf16': (partial(steps, 'rec', 'bf16'), 40), 'cml bf16': (partial(steps, 'cml', 'bf16'), 40),
    'learner rec bf16': (partial(learner, 'rec', 'bf16'), 30), 'files rec bf16': (partial(files, 'rec', 'bf16'), 45),
    'compiled rec bf16': (partial(compiled, 'rec', 'bf16'), 80), 'long rec bf16': (partial(long, 'rec', 'bf16'), 60),
    'long rec fp16': (partial(long, 'rec', 'fp16'), 60), 'rec fp32': (partial(steps, 'rec', 'fp32'), 40), 'cml fp32': (partial(steps, 'cml', 'fp32'), 40),
    'rec fp16': (partial(steps, 'rec', 'fp16'), 40), 'cml fp16': (partial(steps, 'cml', 'fp16'), 40), 'layout rec bf16': (partial(layout, 'rec', 'bf16'), 45),
    'files cml bf16': (partial(files, 'cml', 'bf16'), 60), 'compiled cml bf16': (partial(compiled, 'cml', 'bf16'), 100), 'twins bf16': (partial(twins, 'bf16'), 20), 'layout cml bf16': (partial(layout, 'cml', 'bf16'), 45)}


# ---- one process works, another watches

def tell(**what): print(json.dumps(what), flush=True)


def work_off(names, o):
    "In a process of its own: job after job, a line of JSON before and after each"
    import logging, warnings
    warnings.simplefilter('ignore')
    log = logging.getLogger('distillbook')
    log.handlers,log.propagate = [logging.StreamHandler(sys.stderr)],False
    log.setLevel(logging.INFO)
    for name in names:
        tell(begun=name)
        start = time.perf_counter()
        try: rows = JOBS[name][0](o)
        except Exception as e:
            traceback.print_exc()
            rows = [dict(error=error_of(e))]
        tell(done=name, rows=rows, seconds=round(time.perf_counter()-start, 1))
        sync(o.device) # A GPU that an error has spoilt ends this process here


def machine_of(device):
    from benchmarks.quickstart import machine
    res = machine()
    if device!='cuda': return res
    p = torch.cuda.get_device_properties(0)
    return res | dict(gpu=p.name, memory_GB=round(p.total_memory/2**30, 1), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())


class Watched:
    "A process that works off jobs, and is ended when one takes too long"
    def __init__(self, names, o):
        own = [sys.executable, '-m', 'benchmarks.gpu', '--device', o.device, *(['--small'] if o.small else []), '--work', *names]
        self.process = subprocess.Popen(own, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        self.late = None

    def line(self, seconds):
        "The next line, or None where the process ended, by itself or because it was late"
        def stop():
            self.late = True
            self.process.kill()
        timer = threading.Timer(max(seconds, 1), stop)
        timer.start()
        try:
            for text in self.process.stdout:
                if text.startswith('{'): return json.loads(text)
            return None
        finally: timer.cancel()


def all_jobs(names, o, found, write):
    "Every job's rows into `found`, whatever happens to the process"
    end,left = time.perf_counter()+o.seconds,list(names)
    def seconds(): return end-time.perf_counter()
    while left and seconds()>5:
        watched,now,did = Watched(left, o),None,False
        while left:
            got = watched.line(min(seconds(), JOBS[now][1] if now else 60))
            if got is None: break
            if 'begun' in got: now = got['begun']
            else:
                found['jobs'][now] = dict(rows=got['rows'], seconds=got['seconds'])
                left.remove(now)
                now,did = None,True
                write()
        watched.process.kill()
        watched.process.wait()
        if not left: break
        if now is None and did and not watched.late: continue # It ended between two jobs
        broken = now or left[0]
        why = 'no time was left' if seconds()<=5 else 'it took too long' if watched.late else f'the process ended with {watched.process.returncode}'
        found['jobs'][broken] = dict(rows=[dict(error=why)])
        left.remove(broken)
        write()
    for name in left: found['jobs'][name] = dict(rows=[dict(error='no time was left')])
    write()


def main():
    ap = argparse.ArgumentParser(prog='python -m benchmarks.gpu', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--json', type=Path, default=Path('gpu.json'))
    ap.add_argument('--seconds', type=float, default=230, help='After which no job begins, and the last one is ended')
    ap.add_argument('--device', default='cuda')
    ap.add_argument('--small', action='store_true', help='Tiny networks and few steps')
    ap.add_argument('--jobs', nargs='+', choices=JOBS, metavar='NAME', help=f"Default: all, in this order: {', '.join(JOBS)}")
    ap.add_argument('--work', nargs='+', help=argparse.SUPPRESS)
    o = ap.parse_args()
    if o.work: return work_off(o.work, o)
    if o.device=='cuda' and not torch.cuda.is_available(): ap.error('there is no GPU here; --device cpu --small tries the program')
    from distillbook.core import write_beside
    import pandas as pd
    found = dict(machine=machine_of(o.device), command=' '.join(['python -m benchmarks.gpu', *sys.argv[1:]]), small=o.small, jobs={})
    def write():
        with write_beside(o.json) as tmp: tmp.write_text(json.dumps(found, indent=1))
    all_jobs(o.jobs or list(JOBS), o, found, write)
    for name,job in found['jobs'].items():
        table = pd.DataFrame([{k: v for k,v in row.items() if k!='kernels'} for row in job['rows']])
        print(f'\n{name}\n{table.to_string(index=False, na_rep="")}')
    print(f'\n{o.json} has it all')

if __name__=='__main__': main()
