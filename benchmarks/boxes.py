"""Boxes from maps against a loop over the boxes: `python -m benchmarks.boxes [--rounds 15] [--batch 8] [--threads 1 2] [--box-type quad]`.

The loop (`loop`) is PaddleOCR's algorithm, written anew from it, with the libraries that it calls, in its order and with its types: outlines by OpenCV, one outline after
the other through the rectangle, the score under a mask of the rectangle's size, area and length by shapely, pyclipper, and the second rectangle.

How it was kept fair. Both get the same maps, float32 arrays in memory, and the same sizes. Before anything is timed, the points and scores of both are compared: they have to
be equal to the last bit. Both run in this process with the same number of threads for OpenCV and PyTorch, in turns, whoever is first changing from round to round; garbage is collected between the turns, and
the first round does not count. What is shown is the median over the rounds of the ratio of two neighbouring turns, with the lowest and the highest.
`lean` is the same loop without what an attentive reader of it would take out in a minute (the multiplication of the mask by 255, numpy functions on single numbers): what is left is due to doing things
for the whole batch at once.

Maps: 10, 50 or 200 words in a square of 640 or 960 pixels, tilted by some degrees, with blurred edges and a little noise; one in ten so faint that its score is too low, and as many specks too small for a word.
With two threads or more, both are also run with the batch shared among a pool of so many threads, which is the last column."""
import argparse, gc, json, statistics, sys, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
import cv2, numpy as np, pyclipper, torch
from shapely.geometry import Polygon
from benchmarks.quickstart import machine
from distillbook.core import write_beside
from distillbook.det.boxes import DBPostProcess

def word_map(words, side, rng):
    "A map as a trained net might give it"
    rows = round((3*words)**.5)
    cols = -(-words//rows)
    h,w = side/rows,side/cols
    text = np.zeros((side, side), np.float32)
    for k in range(words):
        centre = ((k%cols+.5)*w + rng.normal(), (k//cols+.5)*h + rng.normal())
        size = (w*rng.uniform(.4, .75), min(h*rng.uniform(.2, .5), 60))
        cv2.fillPoly(text, [cv2.boxPoints((centre, size, rng.normal()*3)).astype(np.int32)], .5 if k%10==9 else .95)
        if k%10==4: text[rng.integers(side), rng.integers(side)] = .9
    return np.clip(cv2.GaussianBlur(text, (0,0), 1) + rng.normal(size=text.shape)*.02, 0, 1).astype(np.float32)

def batch_of(n, words, side, seed=0):
    "Maps [n,1,side,side] and shapes [n,4], as if the pictures had been larger"
    rng = np.random.default_rng([seed, words, side])
    ratio = rng.uniform(.4, 1, (n, 2))
    return np.stack([word_map(words, side, rng) for _ in range(n)])[:,None],np.concatenate([np.round(side/ratio), side/np.round(side/ratio)], 1)

def mini_box(points):
    rect = cv2.minAreaRect(points)
    a,b,c,d = sorted(cv2.boxPoints(rect), key=lambda p: p[0])
    if b[1] <= a[1]: a,b = b,a
    if d[1] <= c[1]: c,d = d,c
    return np.array([a, c, d, b]),min(rect[1])

def score_in(prob, poly, lean):
    h,w = prob.shape
    poly = poly.copy()
    if lean: (x0,y0),(x1,y1) = [[min(max(int(v), 0), n-1) for v,n in zip(f(o), (w,h))] for f,o in ((np.floor, poly.min(0)), (np.ceil, poly.max(0)))]
    else:
        x0,x1 = [np.clip(o.astype(int), 0, w-1) for o in (np.floor(poly[:,0].min()), np.ceil(poly[:,0].max()))]
        y0,y1 = [np.clip(o.astype(int), 0, h-1) for o in (np.floor(poly[:,1].min()), np.ceil(poly[:,1].max()))]
    mask = np.zeros((y1-y0+1, x1-x0+1), np.uint8)
    poly[:,0],poly[:,1] = poly[:,0]-x0,poly[:,1]-y0
    cv2.fillPoly(mask, poly.reshape(1, -1, 2).astype(np.int32), 1)
    return cv2.mean(prob[y0:y1+1,x0:x1+1], mask)[0]

def unclip(points, ratio):
    poly,offset = Polygon(points),pyclipper.PyclipperOffset()
    offset.AddPath(points, pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return offset.Execute(poly.area*ratio/poly.length)

def to_source(points, size, to):
    for axis in 0,1: points[:,axis] = np.clip(np.round(points[:,axis]/size[axis]*to[axis]), 0, to[axis])
    return points.astype(np.int32)

def quad(prob, outline, box_thresh, ratio, slow, lean):
    "The rectangle of one outline and its score, or nothing"
    box,side = mini_box(outline)
    if side < 3: return
    score = score_in(prob, outline.reshape(-1, 2) if slow else box, lean)
    if box_thresh > score: return
    box,side = mini_box(np.array(unclip(box, ratio)).reshape(-1, 1, 2))
    if side >= 5: return box,score

def poly(prob, outline, box_thresh, ratio, slow, lean):
    "The polygon of one outline and its score, or nothing"
    points = cv2.approxPolyDP(outline, .002*cv2.arcLength(outline, True), True).reshape(-1, 2)
    if len(points) < 4: return
    score = score_in(prob, points, lean)
    if box_thresh > score: return
    grown = unclip(points, ratio)
    if len(grown)!=1: return
    points = np.array(grown).reshape(-1, 2)
    if mini_box(points.reshape(-1, 1, 2).astype(np.int32))[1] >= 5: return points,score

def loop(maps, shapes, thresh=.3, box_thresh=.7, max_candidates=1000, unclip_ratio=2., use_dilation=False, score_mode='fast', box_type='quad', lean=False):
    "PaddleOCR's algorithm, box by box"
    prob,res = maps[:,0],[]
    for p,mask,(src_h,src_w,*_) in zip(prob, prob > thresh, shapes):
        if use_dilation: mask = cv2.dilate(mask.astype(np.uint8), np.ones((2,2), np.uint8))
        outlines,_ = cv2.findContours(mask.view(np.uint8) if lean else (mask*255).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
        found = [(quad if box_type=='quad' else poly)(p, o, box_thresh, unclip_ratio, score_mode=='slow', lean) for o in outlines[:max_candidates]]
        found = [(to_source(b, p.shape[::-1], (src_w,src_h)), s) for b,s in filter(None, found)]
        res.append(dict(points=[b for b,_ in found], scores=[s for _,s in found]))
    return res

def same(a, b):
    "Whether two results are equal to the last bit"
    return len(a)==len(b) and all(len(x['points'])==len(y['points']) and all(np.array_equal(p, q) for p,q in zip(x['points'], y['points'])) and list(x['scores'])==list(y['scores']) for x,y in zip(a, b))

def pooled(f, pool, threads):
    "`f`, with the batch shared among the threads of a pool"
    def shared(maps, shapes):
        parts = [slice(k, None, threads) for k in range(threads)]
        return list(pool.map(lambda o: f(maps[o], shapes[o]), parts))
    return shared

def timed(f, *args):
    gc.collect()
    start = time.perf_counter()
    f(*args)
    return time.perf_counter()-start

def compare(ways, maps, shapes, rounds):
    "Seconds of each way, [rounds][ways]"
    times = []
    for r in range(rounds+1):
        order = list(ways)[::1 if r%2 else -1]
        took = {k: timed(ways[k], maps, shapes) for k in order}
        times.append(took)
    return times[1:]

def spread(ratios): return dict(median=round(statistics.median(ratios), 2), lowest=round(min(ratios), 2), highest=round(max(ratios), 2))

def row(words, side, threads, batch, rounds, settings):
    "The figures of one kind of map"
    maps,shapes = batch_of(batch, words, side)
    here,base = DBPostProcess(**settings),partial(loop, **settings)
    lean = partial(base, lean=True)
    found = here(maps, shapes)
    if not (same(found, base(maps, shapes)) and same(found, lean(maps, shapes))): sys.exit(f'{words} words, {side} px: the results differ')
    ways = dict(loop=base, lean=lean, here=here)
    with ThreadPoolExecutor(threads) as pool:
        if threads > 1: ways |= dict(pool=pooled(here, pool, threads))
        times = compare(ways, maps, shapes, rounds)
    res = dict(words=words, side=side, threads=threads, boxes=sum(len(o['points']) for o in found)/batch)
    res |= {f'{k}, ms': round(statistics.median(t[k] for t in times)/batch*1e3, 2) for k in ways}
    return res | {f'{k}/here': spread([t[k]/t['here'] for t in times]) for k in ways if k!='here'}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--words', type=int, nargs='+', default=[10, 50, 200])
    p.add_argument('--sides', type=int, nargs='+', default=[640, 960])
    p.add_argument('--threads', type=int, nargs='+', default=[1, 2])
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--box-type', default='quad', choices=['quad', 'poly'])
    p.add_argument('--out', type=Path, help='a JSON file to write')
    a = p.parse_args()
    settings,rows = dict(box_thresh=.6, unclip_ratio=1.5, box_type=a.box_type),[]
    print('words  side  threads  boxes   loop ms  here ms   loop/here               lean/here               pool/here')
    for threads in a.threads:
        cv2.setNumThreads(threads); torch.set_num_threads(threads)
        for side in a.sides:
            for words in a.words:
                rows.append(r := row(words, side, threads, a.batch, a.rounds, settings))
                ratios = ['{median:5.2f} ({lowest:.2f} .. {highest:.2f})'.format(**r[k]).ljust(23) for k in ('loop/here', 'lean/here', 'pool/here') if k in r]
                print(f"{words:5} {side:5} {threads:8} {r['boxes']:6.1f} {r['loop, ms']:9.2f} {r['here, ms']:8.2f}   {' '.join(ratios)}", flush=True)
    if a.out:
        with write_beside(a.out) as tmp: tmp.write_text(json.dumps(dict(command=' '.join(['python -m benchmarks.boxes', *sys.argv[1:]]), machine=machine(), rows=rows), indent=1))

if __name__ == '__main__': main()
