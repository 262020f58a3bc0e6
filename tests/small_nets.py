"Small networks of PaddleOCR's kinds, made of their parts, for tests of what is done with networks"
from distillbook.det.backbone import MobileNetV3
from distillbook.det.neck import RSEFPN
from distillbook.det.nets import DBHead, DetModel
from distillbook.rec.backbone import MobileNetV1Enhance
from distillbook.rec.labels import Alphabet, SARClasses
from distillbook.rec.neck import EncoderWithSVTR, SequenceEncoder
from distillbook.rec.nets import CTCHead, MultiHead, RecModel
from distillbook.rec.sar import SARHead

def small_rec(
    alphabet:Alphabet, # Its characters are those of both heads
    fc_decay=1e-5, # See `CTCHead`
):
    "PP-OCRv3's recogniser in small, with a CTC and a SAR head: the nets of golden/tiny_distill.pdparams"
    backbone = MobileNetV1Enhance(.0625, (1,2), 'avg', (2,2))
    svtr = EncoderWithSVTR(backbone.out_channels, dims=8, depth=1, hidden_dims=16, use_guide=True, num_heads=4)
    neck = SequenceEncoder(svtr)
    sar = SARHead(backbone.out_channels, len(SARClasses(alphabet.chars)), enc_dim=16, d_k=12, max_text_length=25)
    head = MultiHead(neck, CTCHead(neck.out_channels, len(alphabet), fc_decay=fc_decay), sar_head=sar)
    return RecModel(backbone, None, head, return_all_feats=True)

def small_det():
    "PP-OCRv3's detector in small, with its threshold branch"
    backbone = MobileNetV3(scale=.25, model_name='small')
    neck = RSEFPN(backbone.out_channels, 24)
    return DetModel(backbone, neck, DBHead(neck.out_channels, k=50))
