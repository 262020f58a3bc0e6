"""Reader beside rapidocr with the same two models, on rendered pages: what both read, and how long they take, page by page in turns.

rapidocr gives every detector pixels from -1 to 1; PP-OCRv3's was trained with ImageNet's mean and spread. So it takes part twice: as it comes, and told so.

    python -m benchmarks.reader [--pages 40] [--rounds 3] [--threads 1] [--json FILE]
"""
import argparse, json, os, platform, time
from pathlib import Path
import cv2, numpy as np, torch
from rapidfuzz.distance import Levenshtein
from distillbook.core import write_beside
from distillbook.det.render import render_page
from distillbook.use.ocr import Reader
from distillbook.use.released import teacher_file
from distillbook.data.render import font_files, make_words


def pages(n):
    "Pages of three sizes, a little tilted, all words legible"
    for i in range(n):
        h,w = ((480,640), (736,960), (900,700))[i%3]
        yield render_page(np.random.default_rng(1000+i), h, w, make_words(400, seed=7), font_files(('dejavu','roboto')[i%2]), words_max=40, size=(14,44), tilt=6, illegible=0)


def errors(read, truth):
    "Edits between the words on a page and those read, each word matched with its nearest, and how many characters there are"
    left,wrong = list(read),0
    for t in sorted(truth, key=len, reverse=True):
        best = min(left, key=lambda r: Levenshtein.distance(r, t), default='')
        wrong += min(len(t), Levenshtein.distance(best, t))
        if best in left: left.remove(best)
    return wrong + sum(map(len, left)), sum(map(len, truth))


def theirs(threads, **more):
    from rapidocr import RapidOCR
    ocr = RapidOCR(params={'Det.model_path': str(teacher_file('PP-OCRv3_det')), 'Rec.model_path': str(teacher_file('PP-OCRv3_rec')), 'Global.use_cls': False, 'Global.log_level': 'error',
                           'EngineConfig.onnxruntime.intra_op_num_threads': threads, 'EngineConfig.onnxruntime.inter_op_num_threads': 1, **more})
    return lambda im: [t for line in (ocr(im).txts or ()) for t in line.split()]


def ours(threads):
    reader = Reader(threads=threads)
    return lambda im: [t for line in reader(im) for t in line.text.split()]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--pages', type=int, default=40)
    ap.add_argument('--rounds', type=int, default=3)
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--json', type=Path)
    a = ap.parse_args()
    torch.set_num_threads(a.threads); cv2.setNumThreads(a.threads)
    imagenet = {'Det.mean': [.485,.456,.406], 'Det.std': [.229,.224,.225]}
    programs,wrong,chars,words = {'distillbook': ours(a.threads), 'rapidocr': theirs(a.threads), 'rapidocr, told': theirs(a.threads, **imagenet)},{},0,0
    took = {k: [] for k in programs}
    made = list(pages(a.pages))
    for k,read in programs.items(): read(made[0][0])
    for r in range(a.rounds):
        for i,(im,_,texts) in enumerate(made):
            for k in sorted(programs, key=lambda k: (list(programs).index(k)+i+r)%3):
                start = time.perf_counter()
                got = programs[k](im)
                took[k].append(time.perf_counter()-start)
                if not r: wrong[k] = wrong.get(k, 0)+errors(got, texts)[0]
            if not r: chars,words = chars+sum(map(len, texts)),words+len(texts)
    ratio = {k: np.array(took[k])/np.array(took['distillbook']) for k in programs}
    res = dict(pages=a.pages, words=words, rounds=a.rounds, threads=a.threads, cores=os.cpu_count(), machine=platform.processor() or platform.machine(), cer={k: wrong[k]/chars for k in programs},
               seconds_a_page={k: [float(np.quantile(v, q)) for q in (.5,.1,.9)] for k,v in took.items()}, ratio={k: [float(np.quantile(v, q)) for q in (.5,.1,.9)] for k,v in ratio.items()})
    print(f"{a.pages} pages, {words} words, {a.rounds} rounds, {a.threads} thread(s) of {res['cores']} cores; median (10th to 90th percentile)")
    for k in programs:
        (t,lo,hi),(r,rlo,rhi) = res['seconds_a_page'][k],res['ratio'][k]
        print(f"{k:15} CER {100*res['cer'][k]:5.2f} %   {t:.3f} s a page ({lo:.3f} to {hi:.3f})   {r:.2f} times as long ({rlo:.2f} to {rhi:.2f})")
    if a.json:
        with write_beside(a.json) as tmp: tmp.write_text(json.dumps(res, indent=1))


if __name__ == '__main__': main()
