"""One small detector trained in four ways on the same rendered pages, with several seeds.

    python -m benchmarks.four_detectors [--seeds 0 1 2] [--ways WAY ...] [--steps 660] [--out runs/four_detectors]

The ways: labels alone, once for each of the two students' first weights; mutual learning of two students (DML); collaborative mutual learning (CML) of two under a frozen teacher that was trained here; CML under the released server detector. The pages and their order, the number of steps and the schedule
are the same for all; a seed sets the first weights of both students, the same in all ways, and the order of the pages. What differs is how many networks a step trains. A teacher is asked once about each page, and its answers are kept. One thread.
Each run's numbers, and the boxes found on a few pages, are written when it ends, and a run whose numbers are there is not run again. `nbs/experiments/04_four_ways.ipynb` shows them."""
import argparse, json, time
from pathlib import Path
import cv2, numpy as np, torch
from fastai.basics import set_seed
from fastai.data.core import DataLoaders
from torch import nn
from distillbook.cache import CachedNet
from distillbook.core import write_beside
from distillbook.det.boxes import DBPostProcess
from distillbook.det.losses import db_loss, dila_db, dml_maps
from distillbook.det.metric import DetMetric
from distillbook.det.nets import plain_det
from distillbook.det.render import render_page
from distillbook.det.targets import border_targets, shrink_targets
from distillbook.learner import distill_learner
from distillbook.terms import Term
from distillbook.use.teachers import load_teacher
from distillbook.data.render import font_files, make_words

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
    return [render_page(np.random.default_rng([seed, i]), SIDE, SIDE, words, font_files(family), size=(11, 34)) for i in range(n)]

def pages(n, seed, family):
    "Pictures [n,3,h,w] as the networks want them, polygons, and which words do not count"
    made = rendered(n, seed, family)
    x = torch.from_numpy(np.stack([((im/255.-MEAN)/STD).transpose(2,0,1) for im,*_ in made]).astype(np.float32))
    return x,[torch.from_numpy(p) for _,p,_ in made],[torch.tensor([t=='###' for t in ts], dtype=torch.bool) for *_,ts in made]

class Train:
    "Batches of pages with their four maps, in an order that the seed and the epoch give"
    n_inp = 1
    def __init__(self, x, polys, tags, seed=0):
        maps = [(*border_targets(p, t, SIDE, SIDE), *shrink_targets(p, t, SIDE, SIDE)[:2]) for p,t in zip(polys, tags)]
        self.x,self.maps,self.seed,self.epoch = x,[torch.from_numpy(np.stack(o)) for o in zip(*maps)],seed,0
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

class Maps(nn.Module):
    "The maps of a detector as a bare tensor, which is what a `CachedNet` keeps"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x)['maps']

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
    return names,[*[Term(dila_db, f'{n}.maps', 'Teacher') for n in names], peers, *labels]

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
    with write_beside(path) as tmp: tmp.write_text(json.dumps(o))

def count(net): return sum(p.numel() for p in net.parameters())

def own_teacher(out, train, tests, valid):
    "The teacher trained here, and its numbers in a file of their own"
    net,path = plain_det(**TEACHER),out/'teacher.pth'
    if path.exists(): net.load_state_dict(torch.load(path, weights_only=True))
    else:
        nets,took,_ = fit(['Student'], {}, terms('alone')[1], lambda: plain_det(**TEACHER), train, valid, 77, TEACHER_STEPS)
        net = nets['Student']
        keep(out/'teacher_own.json', dict(measure(net, tests), seconds=took, steps=TEACHER_STEPS, parameters=count(net)))
        with write_beside(path) as tmp: torch.save(net.state_dict(), tmp)
    return net.eval()

def teachers(out, train, tests, valid):
    "By the way's name, a frozen teacher that is asked once about a page"
    own,server = own_teacher(out, train, tests, valid),load_teacher(SERVER, task='det')
    if not (out/'teacher_server.json').exists(): keep(out/'teacher_server.json', dict(measure(server, tests), parameters=count(server)))
    about = f'own {sum(p.double().sum().item() for p in own.parameters()):.9g}'
    return {WAYS[3]: CachedNet(Maps(own), out/f'own_{PAGES}.answers', about), WAYS[4]: CachedNet(Maps(server), out/f'server_{PAGES}.answers', SERVER)}

def path_of(out, way, seed): return out/f"{way.replace(', ', '_').replace(' ', '_')}_{seed}.json"

def is_there(path, steps): return path.exists() and json.loads(path.read_text())['steps']==steps

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--ways', nargs='+', default=WAYS, choices=WAYS)
    p.add_argument('--steps', type=int, default=660)
    p.add_argument('--out', type=Path, default=Path('runs/four_detectors'))
    a = p.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    todo = [(way,seed) for seed in a.seeds for way in a.ways if not is_there(path_of(a.out, way, seed), a.steps)]
    if todo:
        a.out.mkdir(parents=True, exist_ok=True)
        made = {name: pages(TEST, *o) for name,o in SETS.items()}
        train,tests = Train(*pages(PAGES, 1, 'dejavu')),{k: Test(*v) for k,v in made.items()}
        valid = Test(*(o[:BS] for o in made['held out']))
        frozen = teachers(a.out, train, tests, valid) if any('CML' in way for way,_ in todo) else {}
    for way,seed in todo:
        names,ts = terms(way)
        nets,took,parts = fit(names, {'Teacher': frozen[way]} if way in frozen else {}, ts, lambda: plain_det(**STUDENT), train, valid, seed, a.steps)
        keep(path_of(a.out, way, seed), dict(way=way, seed=seed, steps=a.steps, seconds=took, parts=parts, parameters=count(plain_det(**STUDENT)), nets={n: measure(net, tests) for n,net in nets.items()}))
    for seed in a.seeds:
        for way in a.ways:
            o = json.loads(path_of(a.out, way, seed).read_text())
            said = '; '.join(f"{n} held out {v['held out']['hmean']:.3f}, unseen font {v['unseen font']['hmean']:.3f}" for n,v in o['nets'].items())
            print(f"{way:26} seed {seed}: {said}; {o['seconds']:.0f} s", flush=True)

if __name__=='__main__': main()
