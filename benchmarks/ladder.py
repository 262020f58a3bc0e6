"""Six generations read the same pages and lines: `python -m benchmarks.ladder [--lines 100] [--pages 12] [--json FILE]`.

Detectors and recognisers as PaddleOCR released them, v2 (a detector only) to v6, run by onnxruntime with one thread. Lines are words, lines of
receipts, and such lines worn in four ways; pages are scattered words, and receipts fresh and worn. Time is processor time, the networks taking turns, so that a busy machine
counts little."""
import argparse, json, random, sys, time
from pathlib import Path
import cv2, numpy as np, torch
from rapidfuzz.distance import Levenshtein
from benchmarks.quickstart import machine
from benchmarks.reader import errors
from distillbook.core import write_beside
from distillbook.data.render import draw_line, font_files, make_words
from distillbook.det.boxes import DBPostProcess
from distillbook.det.metric import DetMetric
from distillbook.det.render import render_page
from distillbook.rec.worn import WEAR, receipt_text, thermal, worn_line
from distillbook.use.ocr import OcrModel, Reader, find_lines, read_lines
from distillbook.use.released import TEACHERS, teacher_file

NETS = {'v2 server': ('ch_ppocr_server_v2.0_det', None), 'v3': ('PP-OCRv3_det', 'PP-OCRv3_rec'), 'v4': ('PP-OCRv4_det', 'PP-OCRv4_rec'),
    'v5': ('PP-OCRv5_det', 'PP-OCRv5_rec'), 'v6 tiny': ('PP-OCRv6_tiny_det', 'PP-OCRv6_tiny_rec'), 'v6 small': ('PP-OCRv6_det', 'PP-OCRv6_rec')}
FONTS = font_files('dejavu')+font_files('roboto')


def line_sets(n):
    "Name to (pictures, texts), `n` lines each"
    rng,words = random.Random(0),make_words(n, seed=0)
    prints = [receipt_text(rng) for _ in range(n)]
    def fresh(text, i): return cv2.cvtColor(255-draw_line(text, FONTS[i%len(FONTS)]), cv2.COLOR_GRAY2BGR)
    sets = {'words': ([fresh(t, i) for i,t in enumerate(words)], words), 'receipts': ([fresh(t, i) for i,t in enumerate(prints)], prints)}
    for k,wear in enumerate(WEAR):
        sets[f'receipts, {wear}'] = [worn_line(t, wear, FONTS[i%len(FONTS)], np.random.default_rng([k, i])) for i,t in enumerate(prints)],prints
    return sets


def receipt(i):
    "A receipt of sixteen lines on white paper: picture, corners of the lines, lines"
    rng,font,sheet,corners,texts = random.Random(i),FONTS[i%len(FONTS)],np.full((680,640), 255, np.uint8),[],[]
    for y in range(20, 660, 40):
        text = receipt_text(rng)
        line = 255-draw_line(text, font)
        line = cv2.resize(line, (min(600, line.shape[1]*30//line.shape[0]), 30), interpolation=cv2.INTER_AREA)
        sheet[y:y+30,20:20+line.shape[1]] = line
        x0,y0,w,h = cv2.boundingRect((line<128).astype(np.uint8))
        x0,y0 = x0+18,y0+y-2
        corners.append([[x0,y0], [x0+w+4,y0], [x0+w+4,y0+h+4], [x0,y0+h+4]])
        texts.append(text)
    return sheet, np.float32(corners), texts


def page_sets(n):
    "Name to a list of (picture, corners of what is to be found, texts)"
    scenes,receipts = [],[receipt(i) for i in range(n)]
    for i in range(n):
        h,w = ((480,640), (736,960), (900,700))[i%3]
        scenes.append(render_page(np.random.default_rng(1000+i), h, w, make_words(400, seed=7), FONTS, words_max=40, size=(12,40), tilt=6, illegible=0))
    def printed(wear): return [(cv2.cvtColor(wear(im, np.random.default_rng(i)), cv2.COLOR_GRAY2BGR), *more) for i,(im,*more) in enumerate(receipts)]
    return {'scattered words': scenes, 'receipts': printed(lambda im, rng: im), 'receipts, thermal': printed(thermal)}


def timed(took, f, *args):
    start = time.process_time()
    out = f(*args)
    took.append(time.process_time()-start)
    return out


def joined(text): return text.replace(' ', '') # Generations differ in whether they write spaces

def read_all(recs, sets):
    "Of each recogniser and set: lines right (spaces apart), and edits per character; milliseconds a line"
    rows,took = {k: {} for k in recs},{k: [] for k in recs}
    for rec in recs.values(): read_lines(sets['words'][0][:2], rec)
    for name,(pictures,texts) in sets.items():
        reads = {k: [] for k in recs}
        for i,im in enumerate(pictures):
            for k in sorted(recs, key=lambda k: (list(recs).index(k)+i)%len(recs)):
                reads[k].append(timed(took[k], read_lines, [im], recs[k])[0][0])
        for k,got in reads.items():
            got,wanted = list(map(joined, got)),list(map(joined, texts))
            edits = sum(map(Levenshtein.distance, got, wanted))
            rows[k][name] = dict(right=np.mean([a==b for a,b in zip(got, wanted)]), cer=edits/sum(map(len, wanted)))
    return rows, {k: float(1e3*np.median(v)) for k,v in took.items()}


def find_all(dets, sets):
    "Of each detector and set of pages: precision, recall, hmean, and hmean where a loose box will do; milliseconds a megapixel of the pages"
    post = DBPostProcess(thresh=.3, box_thresh=.5, unclip_ratio=1.6, use_dilation=True, max_candidates=100_000)
    rows,took = {k: {} for k in dets},{k: [] for k in dets}
    for name,pages in sets.items():
        metrics,loose = ({k: DetMetric(iou) for k in dets} for iou in (.5, .3))
        for i,(im,polys,_) in enumerate(pages):
            for k in sorted(dets, key=lambda k: (list(dets).index(k)+i)%len(dets)):
                spent = []
                boxes = timed(spent, find_lines, im, dets[k], post)
                took[k].append(spent[0]/(im.shape[0]*im.shape[1]/1e6))
                for m in (metrics[k], loose[k]): m.count_page(boxes, polys, np.zeros(len(polys), bool))
        for k,m in metrics.items(): rows[k][name] = {**m.value, 'hmean, IoU .3': loose[k].value['hmean']}
    return rows, {k: float(1e3*np.median(v)) for k,v in took.items()}


def whole(readers, sets):
    "Edits per character of whole pages, found and read"
    rows = {k: {} for k in readers}
    for name,pages in sets.items():
        for k,reader in readers.items():
            wrong,chars = zip(*(errors([joined(line.text) for line in reader(im)], list(map(joined, texts))) for im,_,texts in pages))
            rows[k][name] = sum(wrong)/sum(chars)
    return rows


def size(name):
    "Megabytes of a released file, and millions of numbers in it"
    import onnx
    from onnx import numpy_helper
    graph = onnx.load(teacher_file(name)).graph
    constants = [numpy_helper.to_array(a.t) for n in graph.node if n.op_type=='Constant' for a in n.attribute if a.name=='value']
    weights = [numpy_helper.to_array(o) for o in graph.initializer]+constants
    return dict(megabytes=TEACHERS[name].size/1e6, millions=sum(w.size for w in weights if w.dtype.kind=='f')/1e6)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--lines', type=int, default=100)
    p.add_argument('--pages', type=int, default=12)
    p.add_argument('--json', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dets,recs = {k: OcrModel(d, 'det', 1) for k,(d,_) in NETS.items()},{k: OcrModel(r, 'rec', 1) for k,(_,r) in NETS.items() if r}
    lines,pages = line_sets(a.lines),page_sets(a.pages)
    read,ms_line = read_all(recs, lines)
    found,ms_page = find_all(dets, pages)
    edits = whole({k: Reader(*NETS[k], threads=1) for k in recs}, pages)
    result = dict(command=' '.join(['python -m benchmarks.ladder', *sys.argv[1:]]), machine=machine(), threads=1, lines=a.lines, pages=a.pages,
        detectors={k: dict(file=d, **size(d), ms_a_megapixel=ms_page[k], sets=found[k]) for k,(d,_) in NETS.items()},
        recognisers={k: dict(file=NETS[k][1], **size(NETS[k][1]), ms_a_line=ms_line[k], sets=read[k]) for k in recs}, pages_cer=edits)
    print(json.dumps(result, indent=1))
    if a.json:
        with write_beside(a.json) as tmp: tmp.write_text(json.dumps(result, indent=1))


if __name__ == '__main__': main()
