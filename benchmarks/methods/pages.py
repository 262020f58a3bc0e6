"""Rendered pages, 96 by 96 pixels, on which a detector finds the words; hmean of its boxes.

300 pages in DejaVu to learn from, 40 of them (`--labels`) with labels, of which there are as many in each batch as of the others; 60 pages to choose by and 200 to measure on, in
Roboto, which nobody has seen. Labels are the maps of differentiable binarisation. Where a loss wants a label and there is none, it gets what the teacher sees."""
from functools import cache, partial
import numpy as np, torch
from fastai.basics import DataLoaders, set_seed
from benchmarks.methods.common import Batches, Told, fit, kept_net, on
from distillbook.data.render import font_files, make_words
from distillbook.det.boxes import DBPostProcess
from distillbook.det.losses import db_loss, dila_db, dkd_maps, one_map
from distillbook.det.metric import DetMetric
from distillbook.det.nets import plain_det
from distillbook.det.render import render_page
from distillbook.det.targets import border_targets, shrink_targets
from distillbook.features import cwd, fgd, ofd, ofd_margin, pkd, weighted_distance
from distillbook.learned import Generation, ReviewKD
from distillbook.losses import attention_transfer, distance, kd, upcast
from distillbook.relations import pkt, sp
from distillbook.terms import Term

EPOCHS,LABELS,N,BS,LR,SIDE = [4],40,300,8,2e-2,96
MEASURED = 'hmean of the boxes on pages with an unseen font'
POST = dict(thresh=.3, box_thresh=.4, unclip_ratio=1.5) # Boxes of little certainty count: the students are young
SIZES = dict(learn=N, choose=60, test=200)

# ---- data

@cache
def pages(part):
    "Pictures [n,3,h,w], polygons, and which words do not count"
    words,fonts = make_words(2000, seed=7),font_files('dejavu' if part=='learn' else 'roboto')
    made = [render_page(np.random.default_rng([len(part), i]), SIDE, SIDE, words, fonts, words_max=4, size=(11,18)) for i in range(SIZES[part])]
    x = np.stack([(image/127.5-1).transpose(2,0,1) for image,*_ in made]).astype(np.float32)
    return torch.from_numpy(x),[p for _,p,_ in made],[np.array([t=='###' for t in texts], bool) for *_,texts in made]

@cache
def maps():
    "Threshold maps and masks, shrink maps and masks of the pages to learn from, [n,h,w] each"
    _,polys,ignored = pages('learn')
    made = [(*border_targets(p, t, SIDE, SIDE), *shrink_targets(p, t, SIDE, SIDE)[:2]) for p,t in zip(polys, ignored)]
    return [torch.from_numpy(np.stack(o)) for o in zip(*made)]

def dls(seed, labels):
    g = torch.Generator().manual_seed(seed)
    nothing = partial(map, torch.zeros_like) # Masks of 0: nothing counts
    data = Batches((pages('learn')[0], *maps()), nothing, torch.randperm(N, generator=g)[:labels], BS, seed)
    return DataLoaders(data, data)

def batch(): return pages('learn')[0][:BS],(*(m[:BS] for m in maps()), torch.arange(BS))

# ---- networks

def first(): return seeing(plain_det((4,8,16,32), 16))
def student(method, net): return net
def layers(net): return [*net.backbone.parameters(), *net.neck.parameters()]

TEACHERS,TEACHER_EPOCHS = ('Teacher',),16

@cache
def teacher(name):
    set_seed(50)
    return kept_net(name, seeing(plain_det((16,32,64,128), 64)), lambda net: fit({name: net}, [lesson(name)], dls(50, N), TEACHER_EPOCHS, lr=3e-3))

def seeing(net):
    net.return_all_feats = True
    return net

@cache
def told(name): return Told(teacher(name), pages('learn')[0], before='head.binarize.conv_bn1')

# ---- terms

MAPS,NECK,DEEP = ('maps','maps'),('neck_out','neck_out'),('backbone_out.3','backbone_out.3')

def lesson(net, method=''): return Term(db_loss, f'{net}.maps', targets=[0,1,2,3], name=f'labels {net}')

def two_classes(maps):
    "The shrink map as logits [N,H,W,2] of no text and text"
    p, = upcast(one_map('two_classes', maps, 'shrink_maps'))
    z = p.logit(1e-6)
    return torch.stack([-z/2, z/2], -1)

def of_pixels(fn):
    "A loss of logits, pixel by pixel"
    def by_pixels(student, teacher): return fn(two_classes(student), two_classes(teacher))
    return on(by_pixels, *MAPS)

def text_here(teacher, shrink_map, mask): return torch.where(mask.flatten(1).amax(1)[:,None,None]>0, shrink_map, (one_map('', teacher, 'shrink_maps')>.3).float())

def dilated(student, teacher): return dila_db(student, teacher, torch.ones_like(student[:,0]))
def cwd_maps(student, teacher): return cwd(*[two_classes(o)[...,1][:,None] for o in (student, teacher)])
def focal(student, teacher, shrink_map, mask, maps): return fgd(student, teacher, text_here(maps, shrink_map, mask))
def where_text(student, teacher, maps): return weighted_distance(student, teacher, one_map('', maps, 'shrink_maps'))

def before_relu(s): return Term(partial(ofd, margin=ofd_margin(teacher('Teacher').head.binarize.conv_bn1)), f'{s}.head.binarize.conv_bn1', 'Teacher.before')
def review(s): return Term(ReviewKD, *(f'{n}.backbone_out.{i}' for n in (s, 'Teacher') for i in range(4)))

METHODS = dict(
    dila_db=on(dilated, *MAPS), soft_maps=on(dkd_maps, *MAPS), kd=of_pixels(partial(kd, dim=-1)), cwd_maps=on(cwd_maps, *MAPS), hint=on(distance, *NECK), attention=on(attention_transfer, *NECK),
    cwd=on(cwd, *NECK), pkd=on(pkd, *NECK), fgd=lambda s: Term(focal, f'{s}.neck_out', 'Teacher.neck_out', targets=[2,3], maps='Teacher.maps'), weighted=on(where_text, *NECK, maps='Teacher.maps'),
    ofd=before_relu, generation=on(distance, *NECK, projector=Generation), ReviewKD=review, sp=on(sp, *DEEP), pkt=on(pkt, *DEEP))
NO_TEACHER,ALONE = set(),{}

# ---- how good they are

@torch.no_grad()
def score(net, part):
    "hmean"
    x,polys,ignored = pages(part)
    metric,post = DetMetric(),DBPostProcess(**POST)
    for i in range(0, len(x), 50):
        maps = net.eval()(x[i:i+50])['maps']
        metric.add(post(maps, torch.tensor([[SIDE, SIDE, 1., 1.]]*len(maps))), (polys[i:i+50], ignored[i:i+50]))
    return metric.value['hmean']
