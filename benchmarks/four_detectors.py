"""One small detector trained in four ways on the same rendered pages, with several seeds.

    python -m benchmarks.four_detectors [--seeds 0 1 2] [--ways WAY ...] [--steps 660] [--out runs/four_detectors]

The ways: labels alone, once for each of the two students' first weights; mutual learning of two students (DML); collaborative mutual learning (CML)
of two under a frozen teacher that was trained here; CML under the released server detector. The pages and their order, the number of steps and the
schedule are the same for all; a seed sets the first weights of both students, the same in all ways, and the order of the pages. What differs is how
many networks a step trains. A teacher is asked once about each page, and its answers are kept. One thread.
Each run's numbers, and the boxes found on a few pages, are written when it ends, and a run whose numbers are there is not run again. At the end
`four_detectors.json` and `four_detectors.png` are written beside them; copied to `benchmarks/results`, they are what the chapter shows."""
import argparse, json, sys, time
from pathlib import Path
from statistics import mean
import cv2, matplotlib.pyplot as plt, numpy as np, torch
from fastai.basics import set_seed
from fastai.data.core import DataLoaders
from benchmarks.quickstart import machine
from distillbook.cache import CachedNet
from distillbook.core import write_beside
from distillbook.data.render import font_files, make_words
from distillbook.det.boxes import DBPostProcess
from distillbook.det.losses import db_loss, dila_db, dilate, dml_maps
from distillbook.det.metric import DetMetric
from distillbook.det.nets import plain_det
from distillbook.det.render import render_page
from distillbook.det.targets import border_targets, shrink_targets
from distillbook.learner import distill_learner
from distillbook.terms import Term
from distillbook.use.results import plot_found
from distillbook.use.teachers import load_teacher

SIDE,PAGES,TEST,BS,LR = 256,480,150,8,3e-3
STUDENT,TEACHER = dict(channels=(8,16,32,64), out_channels=32),dict(channels=(24,48,96,192), out_channels=64)
SERVER,TEACHER_STEPS = 'ch_ppocr_server_v2.0_det',840
WAYS = ['alone', 'alone, Student2', 'DML', 'CML, teacher trained here', 'CML, server teacher']
SETS = {'held out': (2,'dejavu'), 'unseen font': (3,'roboto')}
MEAN,STD = (np.float32(o) for o in ((.485,.456,.406),(.229,.224,.225)))
POST = dict(thresh=.3, box_thresh=.6, unclip_ratio=1.5) # As in PaddleOCR's ch_PP-OCRv3_det_cml.yml
SHOWN = 4 # Test pages whose boxes are kept for the chapter

def rendered(n, seed, family):
    "Pages as `render_page` gives them; size and words are those of the experiment"
    words = make_words(2000, seed=7)
    rngs = [np.random.default_rng([seed, i]) for i in range(n)]
    return [render_page(rng, SIDE, SIDE, words, font_files(family), size=(11,34)) for rng in rngs]

def pages(n, seed, family):
    "Pictures [n,3,h,w] as the networks want them, polygons, and which words do not count"
    made = rendered(n, seed, family)
    x = np.stack([((image/255.-MEAN)/STD).transpose(2,0,1) for image,*_ in made]).astype(np.float32)
    ignored = [torch.tensor([t=='###' for t in texts], dtype=torch.bool) for *_,texts in made]
    return torch.from_numpy(x),[torch.from_numpy(p) for _,p,_ in made],ignored

class Train:
    "Batches of pages with their four maps, in an order that the seed and the epoch give"
    n_inp = 1
    def __init__(self, x, polys, tags, seed=0):
        maps = [(*border_targets(p, t, SIDE, SIDE), *shrink_targets(p, t, SIDE, SIDE)[:2]) for p,t in zip(polys, tags)]
        self.x,self.maps = x,[torch.from_numpy(np.stack(o)) for o in zip(*maps)]
        self.seed,self.epoch = seed,0
    def __len__(self): return len(self.x)//BS
    def set_epoch(self, epoch, skip=0): self.epoch = epoch
    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.x))
        for i in range(len(self)):
            idx = order[i*BS:(i+1)*BS]
            yield self.x[idx],*(m[idx] for m in self.maps)

class Test:
    "Batches of pages with their polygons"
    n_inp = 1
    def __init__(self, x, polys, tags): self.x,self.polys,self.tags = x,polys,tags
    def __len__(self): return -(-len(self.x)//BS)
    def __iter__(self):
        for i in range(0, len(self.x), BS):
            x = self.x[i:i+BS]
            yield x,torch.tensor([[SIDE, SIDE, 1., 1.]]*len(x)),self.polys[i:i+BS],self.tags[i:i+BS]

@torch.no_grad()
def measure(net, tests):
    "hmean, precision and recall on each set of pages, and the boxes on some of them"
    net.eval()
    res,post = {},DBPostProcess(**POST)
    for name,test in tests.items():
        metric,boxes = DetMetric(),[]
        for batch in test:
            got = post(net(batch[0]), batch[1])
            metric.add(got, batch)
            boxes += [o['points'].tolist() for o in got]
        res[name] = dict(metric.value, boxes=boxes[:SHOWN])
    return res

def terms(way):
    "Names of the students, and the terms"
    names = dict(zip(WAYS, (['Student'], ['Student2']))).get(way, ['Student','Student2'])
    labels = [Term(db_loss, f'{n}.maps') for n in names]
    if 'alone' in way: return names,labels
    peers = Term(dml_maps, 'Student.maps', 'Student2.maps')
    if way=='DML': return names,[*labels, peers]
    return names,[*[Term(dila_db, f'{n}.maps', 'Teacher.maps', targets=[3]) for n in names], peers, *labels]

def fit(names, frozen, ts, make, train, valid, seed, steps):
    "The networks after training, and the seconds that it took"
    set_seed(1000+seed)
    nets = {n: make() for n in ('Student','Student2')}
    nets = {n: nets[n] for n in names}
    train.seed = seed
    learn = distill_learner(DataLoaders(train, valid), {**nets, **frozen}, ts, frozen=list(frozen))
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(max(1, round(steps/len(train))), LR)
    return nets,time.perf_counter()-start,learn.parts().iloc[-len(train):].mean().to_dict()

def keep(path, o):
    with write_beside(path) as tmp: tmp.write_text(json.dumps(o, indent=1))

def count(net): return sum(p.numel() for p in net.parameters())

@torch.no_grad()
def agreement(net, pages, thresh=.3):
    "How what a teacher draws agrees with the labels: areas, shares and Dice over some pages"
    labels,mask = Train(*pages).maps[2:]
    seen = torch.cat([dilate((net(x)['maps'][:,0]>thresh).float()) for x in pages[0].split(BS)])
    both,area,own = ((o*mask).sum().item() for o in (seen*labels, seen, labels))
    shares = {'area / labels': area/own, 'of the labels, seen': both/own, 'of what is seen, labelled': both/area}
    return shares | {'Dice': 2*both/(area+own)}

def measured_teacher(net, tests, pages, **more):
    return dict(measure(net, tests), agreement=agreement(net, pages), parameters=count(net), **more)

def own_teacher(out, train, tests, valid, some):
    "The teacher trained here, and its numbers in a file of their own"
    net,path = plain_det(**TEACHER),out/'teacher.pth'
    if path.exists(): net.load_state_dict(torch.load(path, weights_only=True))
    else:
        make,labels = lambda: plain_det(**TEACHER),terms('alone')[1]
        nets,took,_ = fit(['Student'], {}, labels, make, train, valid, 77, TEACHER_STEPS)
        net = nets['Student'].eval()
        keep(out/'teacher_own.json', measured_teacher(net, tests, some, seconds=took, steps=TEACHER_STEPS))
        with write_beside(path) as tmp: torch.save(net.state_dict(), tmp)
    return net.eval()

def teachers(out, train, tests, valid, some):
    "By the way's name, a frozen teacher that is asked once about a page"
    own,server = own_teacher(out, train, tests, valid, some),load_teacher(SERVER, task='det')
    if not (out/'teacher_server.json').exists(): keep(out/'teacher_server.json', measured_teacher(server, tests, some))
    about = f'own {sum(p.double().sum().item() for p in own.parameters()):.9g}'
    return {WAYS[3]: CachedNet(own, out/'own.answers', about), WAYS[4]: CachedNet(server, out/'server.answers', SERVER)}

def path_of(out, way, seed): return out/f"{way.replace(', ', '_').replace(' ', '_')}_{seed}.json"

def is_there(path, steps): return path.exists() and json.loads(path.read_text())['steps']==steps

# ---- what the chapter shows

MEASURES = ('hmean','precision','recall')

def rows_of(run):
    "Rows of the chapter's table: a network on a set"
    for net,sets in run['nets'].items():
        for name,o in sets.items():
            numbers = {k: round(o[k], 4) for k in MEASURES}
            yield dict(way=run['way'].removesuffix(', Student2'), seed=run['seed'], net=net, set=name, **numbers)

def spread(values): return dict(mean=round(mean(values), 3), lowest=round(min(values), 3), highest=round(max(values), 3))

def summary_of(rows):
    "A way on a set: its students, and what they gain over the same students alone"
    alone = {(r['net'],r['seed'],r['set']): r['hmean'] for r in rows if r['way']==WAYS[0]}
    for way in dict.fromkeys(r['way'] for r in rows):
        for name in SETS:
            own = [r for r in rows if r['way']==way and r['set']==name]
            gains = [r['hmean']-alone[k] for r in own if (k := (r['net'],r['seed'],name)) in alone]
            means = {k: round(mean(r[k] for r in own), 3) for k in ('precision','recall')}
            gain = spread(gains) if gains and way!=WAYS[0] else None
            yield dict(way=way, set=name, hmean=spread([r['hmean'] for r in own]), gain=gain, **means)

def teacher_rows(out):
    "Rows of the teachers that were measured"
    for name,file in (('teacher trained here','own'), ('server teacher','server')):
        if not (path := out/f'teacher_{file}.json').exists(): continue
        o = json.loads(path.read_text())
        sets = {s: {k: round(o[s][k], 4) for k in MEASURES} for s in SETS}
        yield dict(net=name, parameters=o['parameters'], **sets, agreement={k: round(v, 2) for k,v in o['agreement'].items()})

def draw(found, path):
    "The first held-out pages, and what each network found there"
    shown,n = rendered(3, *SETS['held out']),3
    images = [torch.from_numpy(image).permute(2,0,1) for image,*_ in shown]
    words,ignored = [p for _,p,_ in shown],[[t=='###' for t in texts] for *_,texts in shown]
    said = {name: [dict(points=np.array(b, dtype=np.float32)) for b in boxes[:n]] for name,boxes in found.items()}
    fig = plot_found((images, [(SIDE,SIDE,1.,1.)]*n, words, ignored), said, n)
    fig.savefig(path, dpi=40)
    plt.close(fig)

def report(runs, a):
    "`four_detectors.json` and `four_detectors.png`"
    command = ' '.join(['python -m benchmarks.four_detectors', *sys.argv[1:]])
    sizes = dict(student=count(plain_det(**STUDENT)), teacher=count(plain_det(**TEACHER)))
    rows = [row for r in runs for row in rows_of(r)]
    result = dict(command=command, machine=machine(), steps=a.steps, pages=a.pages, test_pages=a.test, parameters=sizes,
        summary=list(summary_of(rows)), rows=rows, teachers=list(teacher_rows(a.out)))
    keep(a.out/'four_detectors.json', result)
    first = [r for r in runs if r['seed']==runs[0]['seed'] and 'Student' in r['nets']]
    draw({r['way']: r['nets']['Student']['held out']['boxes'] for r in first}, a.out/'four_detectors.png')

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ways', nargs='+', default=WAYS, choices=WAYS)
    p.add_argument('--steps', type=int, default=660)
    p.add_argument('--pages', type=int, default=PAGES, help='to train on')
    p.add_argument('--test', type=int, default=TEST, help='pages of each set to measure on')
    p.add_argument('--out', type=Path, default=Path('runs/four_detectors'))
    a = p.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    todo = [(way,seed) for seed in a.seeds for way in a.ways if not is_there(path_of(a.out, way, seed), a.steps)]
    if todo: run_all(todo, a)
    runs = [json.loads(path_of(a.out, way, seed).read_text()) for seed in a.seeds for way in a.ways]
    for r in runs:
        hmeans = {n: {s: round(o[s]['hmean'], 3) for s in SETS} for n,o in r['nets'].items()}
        print(f"{r['way']:26} seed {r['seed']}: {hmeans}; {r['seconds']:.0f} s", flush=True)
    report(runs, a)

def run_all(todo, a):
    "Train what is not there yet"
    a.out.mkdir(parents=True, exist_ok=True)
    made,pages_in = {name: pages(a.test, *o) for name,o in SETS.items()},pages(a.pages, 1, 'dejavu')
    train,tests = Train(*pages_in),{k: Test(*v) for k,v in made.items()}
    valid,some = Test(*(o[:BS] for o in made['held out'])),[o[:96] for o in pages_in]
    frozen = teachers(a.out, train, tests, valid, some) if any('CML' in way for way,_ in todo) else {}
    for way,seed in todo:
        names,ts = terms(way)
        teacher = {'Teacher': frozen[way]} if way in frozen else {}
        nets,took,parts = fit(names, teacher, ts, lambda: plain_det(**STUDENT), train, valid, seed, a.steps)
        measured = {n: measure(net, tests) for n,net in nets.items()}
        keep(path_of(a.out, way, seed), dict(way=way, seed=seed, steps=a.steps, seconds=took, parts=parts, nets=measured))

if __name__=='__main__': main()
