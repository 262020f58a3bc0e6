"""Maps from polygons against a loop over polygons and edges: `python -m benchmarks.targets [--rounds 9]`.

The loop (`loop_border`, `loop_shrink`) is PaddleOCR's algorithm written anew: for each polygon the two ends' distances and the cosine rule over its whole padded box, edge after edge, in float64, and the areas corner by corner in Python.

How it was kept fair. Both get the same polygons and sizes, use the same pyclipper, shapely and cv2.fillPoly, and run in turns in this process with one thread for OpenCV and for matrix products; which goes first changes from round to round. Before anything is timed their four maps are compared: masks and shrink maps must be equal, threshold maps to 1e-5.
Shown are medians over the rounds and, of the ratio of neighbouring turns, the lowest and the highest. Border and shrink maps are timed apart and together."""
import argparse, os, statistics, time
if __name__=='__main__': os.environ.update({f'{o}_NUM_THREADS': '1' for o in ('OMP','OPENBLAS','MKL')})
import cv2, numpy as np, pyclipper
from shapely.geometry import Polygon
from benchmarks.quickstart import machine
from distillbook.det.targets import border_targets, shrink_targets

def _offset(poly, by):
    clip = pyclipper.PyclipperOffset()
    clip.AddPath([tuple(p) for p in poly], pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    return clip.Execute(by)

def _edge(xs, ys, a, b):
    da,db = np.square(xs-a[0])+np.square(ys-a[1]),np.square(xs-b[0])+np.square(ys-b[1])
    c = np.square(a[0]-b[0])+np.square(a[1]-b[1])
    cos = (c-da-db)/(2*np.sqrt(da*db))
    d = np.sqrt(da*db*np.nan_to_num(1-np.square(cos))/c)
    d[cos<0] = np.sqrt(np.fmin(da, db))[cos<0]
    return d

def loop_border(polys, ignore, h, w, ratio=.4, low=.3, high=.7):
    canvas,mask = np.zeros((h,w), np.float32),np.zeros((h,w), np.float32)
    for poly,skip in zip(polys, ignore):
        shape = Polygon(poly)
        if skip or shape.area<=0: continue
        p,reach = np.array(poly),shape.area*(1-np.power(ratio, 2))/shape.length
        grown = np.array(_offset(p, reach)[0])
        cv2.fillPoly(mask, [grown.astype(np.int32)], 1.)
        (x0,y0),(x1,y1) = grown.min(0),grown.max(0)
        width,height = x1-x0+1,y1-y0+1
        p[:,0] -= x0
        p[:,1] -= y0
        xs = np.broadcast_to(np.linspace(0, width-1, num=width).reshape(1, width), (height,width))
        ys = np.broadcast_to(np.linspace(0, height-1, num=height).reshape(height, 1), (height,width))
        near = np.zeros((len(p),height,width), np.float32)
        for i in range(len(p)): near[i] = np.clip(_edge(xs, ys, p[i], p[(i+1)%len(p)])/reach, 0, 1)
        near = near.min(0)
        a,b,c,d = (min(max(0, v), n-1) for v,n in ((x0,w),(x1,w),(y0,h),(y1,h)))
        canvas[c:d+1,a:b+1] = np.fmax(1-near[c-y0:d-y1+height,a-x0:b-x1+width], canvas[c:d+1,a:b+1])
    return canvas*(high-low)+low,mask

def loop_shrink(polys, ignore, h, w, ratio=.4, least=8):
    polys,ignore = [p.copy() for p in polys],np.array(ignore)
    drawn,mask = np.zeros((h,w), np.float32),np.ones((h,w), np.float32)
    for i,p in enumerate(polys):
        p[:,0],p[:,1] = np.clip(p[:,0], 0, w-1),np.clip(p[:,1], 0, h-1)
        area,q = 0,p[-1]
        for r in p:
            area += r[0]*q[1]-r[1]*q[0]
            q = r
        if abs(area/2)<1: ignore[i] = True
        if area>0: polys[i] = p[::-1]
    for i,p in enumerate(polys):
        left = []
        if not ignore[i] and min(max(p[:,1])-min(p[:,1]), max(p[:,0])-min(p[:,0]))>=least:
            shape = Polygon(p)
            for r in np.arange(ratio, 1, ratio):
                left = _offset(p, -shape.area*(1-np.power(r, 2))/shape.length)
                if len(left)==1: break
        if not left:
            cv2.fillPoly(mask, [p.astype(np.int32)], 0)
            ignore[i] = True
        for o in left: cv2.fillPoly(drawn, [np.array(o).reshape(-1, 2).astype(np.int32)], 1)
    return drawn,mask,ignore

def words(n, side, rng):
    "Tilted rectangles with the shapes of words, as large as there is room for n of them"
    made,s = [],side*(.5 if n<30 else .35 if n<100 else .18)
    for _ in range(n):
        h = rng.uniform(10, max(14, s*.22))
        w,t = h*rng.uniform(1.5, 8),rng.normal(0, .25)
        turn = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
        made.append(np.array([[-w,-h],[w,-h],[w,h],[-w,h]])/2@turn.T + rng.uniform(0, side, 2))
    return np.array(made, np.float32)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rounds', type=int, default=9)
    a = p.parse_args()
    cv2.setNumThreads(1)
    np.seterr(all='ignore')
    print(machine())
    print('words  side   border: loop ms  here ms  loop/here              shrink: loop/here          both: loop/here')
    for side in (640,960):
        for n in (10,50,200):
            polys = words(n, side, np.random.default_rng(n))
            args = polys,np.zeros(n, bool),side,side
            want,got = (*loop_border(*args), *loop_shrink(*args)),(*border_targets(*args), *shrink_targets(*args))
            assert np.abs(want[0]-got[0]).max()<1e-5 and all(np.array_equal(x, y) for x,y in zip(want[1:], got[1:]))
            took = {f: [] for f in (loop_border, border_targets, loop_shrink, shrink_targets)}
            for r in range(a.rounds+1):
                for f in list(took)[::1 if r%2 else -1]:
                    start = time.perf_counter()
                    f(*args)
                    if r: took[f].append(1e3*(time.perf_counter()-start))
            lb,hb,ls,hs = took.values()
            said = lambda x, y: (lambda q: f'{statistics.median(q):5.2f} ({min(q):.2f} .. {max(q):.2f})')([i/j for i,j in zip(x, y)])
            both = [[i+j for i,j in zip(*o)] for o in ((lb,ls),(hb,hs))]
            print(f'{n:5}  {side:4}        {statistics.median(lb):8.1f} {statistics.median(hb):8.1f}   {said(lb, hb):22}  {said(ls, hs):22}  {said(*both)}', flush=True)

if __name__=='__main__': main()
