"""Numbers printed in the papers, to stand beside ours: percent, as printed.

A row belongs to a benchmark under one protocol ("fashioniq:reversed" is Pic2Word's own) and to a
split. Never shown for other data, such as the embedded world. Backbones: clip_b32, clip_b16,
clip_l14, clip_bigg, clip_rn50, blip_b, blip_l, bge_vl_b, bge_vl_l. "+tat", "+rtd" stand for the
method on a backbone so tuned. Papers: searle 2303.15247, pic2word 2302.03084, slerp 2405.00571
(with TAT), isa (ICLR 2024), rtd 2406.09188, compodiff 2303.11916, megapairs 2412.14475 (BGE-VL,
there MMRet; image + text with unit=False; CIRCO with the shared concept alone), magiclens
2403.19651 (as its repository prints them, with those of its released weights). `unstated`: the
paper does not say how captions are joined, or which text a query has.
"Table N: ..." stands for a variant of the method, shown only to who reproduces the paper's tables.
Left out: rows whose printed averages contradict their own columns.
"""

# ruff: noqa: E501 (a row of numbers is one line)

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

METRICS: Mapping[str, tuple[str, ...]] = {
    "fashioniq": ("R@10/shirt", "R@50/shirt", "R@10/dress", "R@50/dress", "R@10/toptee",
                  "R@50/toptee", "R@10", "R@50"),
    "cirr": ("R@1", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"),
    "circo": ("mAP@5", "mAP@10", "mAP@25", "mAP@50"),
    "genecis": ("R@1/focus_attribute", "R@1/change_attribute", "R@1/focus_object",
                "R@1/change_object", "R@1", "R@2", "R@3"),
    "coco_object": ("R@1", "R@5", "R@10"),
    "coco_captions": (
        "i2t COCO 5k R@1", "i2t COCO 5k R@5", "i2t COCO 5k R@10",
        "i2t CxC R@1", "i2t CxC R@5", "i2t CxC R@10",
        "i2t ECCV mAP@R", "i2t ECCV R-P", "i2t ECCV R@1",
        "t2i COCO 5k R@1", "t2i COCO 5k R@5", "t2i COCO 5k R@10",
        "t2i CxC R@1", "t2i CxC R@5", "t2i CxC R@10",
        "t2i ECCV mAP@R", "t2i ECCV R-P", "t2i ECCV R@1",
    ),
    "cirr/inversion": ("R@1", "R@3", "R@5"),
}  # fmt: skip
"""Benchmark -> what the columns below are."""

_TABLES: Mapping[tuple[str, str], str] = {
    ("fashioniq", "val"): """
        searle | image_only | clip_b32 | 6.92 14.23 4.46 12.19 6.32 13.77 5.90 13.37
        searle | text_only  | clip_b32 | 19.87 34.99 15.42 35.05 20.81 40.49 18.70 36.84
        searle | image_text | clip_b32 | 13.44 26.25 13.83 30.88 17.08 31.67 14.78 29.60
        searle | palavra    | clip_b32 | 21.49 37.05 17.25 35.94 20.55 38.76 19.76 37.25
        searle | searle_oti | clip_b32 | 25.37 41.32 17.85 39.91 24.12 45.79 22.44 42.34
        searle | searle     | clip_b32 | 24.83 41.11 18.15 38.57 25.60 46.25 22.86 41.98
        searle | searle_oti | clip_l14 | 30.37 47.49 21.57 44.47 30.90 51.76 27.61 47.90
        searle | searle     | clip_l14 | 27.43 45.68 20.32 43.18 29.32 50.17 25.69 46.34
        searle | combiner   | clip_b32 supervised | - - - - - - 32.96 54.55
        searle, Table 4: L2 loss | searle_oti | clip_b32 | - - - - - - 16.46 29.04
        searle, Table 4: concept alone | searle_oti | clip_b32 | - - - - - - 21.34 39.70
        searle, Table 4: random concepts | searle_oti | clip_b32 | - - - - - - 20.90 40.24
        searle, Table 4: no regulariser | searle_oti | clip_b32 | - - - - - - 17.86 35.99
        searle, Table 4: cosine distillation | searle | clip_b32 | - - - - - - 21.59 39.41
        searle, Table 4: no distillation | searle | clip_b32 | - - - - - - 19.41 38.39
        searle, Table 4: no regulariser | searle | clip_b32 | - - - - - - 22.83 42.02
        searle, Table 8: on FashionIQ | searle | clip_b32 | 26.35 43.42 20.13 42.79 28.00 48.80 24.82 45.00
        searle, Table 8: on CIRR | searle | clip_b32 | 24.43 41.75 18.00 38.97 25.24 46.15 22.55 42.29
        searle, Table 8: on FashionIQ | searle | clip_l14 | 29.93 49.01 24.14 45.86 31.36 53.08 28.48 49.31
        searle, Table 8: on CIRR | searle | clip_l14 | 25.71 43.18 20.77 42.54 27.54 48.90 24.67 44.87
        slerp, published weights | searle | clip_l14 | 26.89 45.58 20.48 43.13 29.32 49.97 25.56 46.23
        slerp, published weights | lincir | clip_l14 | 29.10 46.81 20.92 42.44 28.81 50.18 26.28 46.49
        slerp, unstated | image_only | clip_b32 | 7.46 14.03 3.87 10.81 6.22 13.36 5.85 12.73
        slerp, unstated | text_only  | clip_b32 | 20.26 35.28 13.58 31.78 20.19 40.49 18.01 35.85
        slerp, unstated | slerp      | clip_b32 | 23.75 40.92 20.53 41.00 26.98 46.77 23.75 42.90
        slerp, unstated | slerp      | clip_b32+tat | 23.06 41.95 19.24 42.14 26.57 47.78 22.96 43.96
        slerp, unstated | image_only | clip_l14 | 11.04 20.22 4.86 12.99 8.67 16.52 8.19 16.58
        slerp, unstated | text_only  | clip_l14 | 20.46 33.61 14.33 32.57 21.72 39.32 18.84 35.17
        slerp, unstated | slerp      | clip_l14 | 28.66 43.96 21.96 41.55 30.24 48.34 26.95 44.62
        slerp, unstated | slerp      | clip_l14+tat | 29.64 46.47 23.35 45.12 31.97 51.20 28.32 47.60
        isa, unstated | image_only | blip_b | 7.07 16.39 4.07 11.35 6.88 13.67 6.01 13.67
        isa, unstated | text_only  | blip_b | 23.45 39.21 18.10 35.05 26.06 44.93 22.54 39.73
        isa, unstated | image_text | blip_b | 8.15 18.89 5.16 13.58 7.80 16.62 7.03 16.36
        isa, unstated | pic2word   | blip_b | 27.51 46.01 21.35 42.68 29.12 49.33 25.99 46.00
        isa, unstated | searle     | blip_b | 29.72 48.53 22.11 41.79 31.03 52.37 27.62 47.56
        isa, unstated | isa        | blip_b, EfficientNet-B2 | 30.03 48.58 25.33 46.26 33.45 53.80 29.60 49.54
        isa, unstated | isa        | blip_b, EfficientViT-M2 | 29.64 48.68 25.48 45.51 32.94 54.31 29.35 49.50
        isa, unstated | isa        | blip_b, symmetric | 30.79 50.05 24.69 43.88 33.91 53.65 29.79 49.19
        isa, unstated | isa        | blip_b, EfficientNet-B0 | 28.95 48.04 25.19 45.56 32.53 52.78 28.89 48.79
        isa, unstated | isa        | blip_b, MobileNetV2 | 28.95 47.35 24.34 45.51 32.02 54.11 28.44 48.99
        isa, unstated | isa        | blip_b, MobileViTV2 | 26.35 43.23 22.16 40.46 27.84 49.01 25.45 44.23
        rtd | pic2word | clip_b32     | 13.40 28.46 8.48 20.77 13.31 29.68 11.73 26.30
        rtd | pic2word | clip_b32+rtd | 23.06 40.48 20.33 41.75 24.12 46.35 22.50 42.86
        rtd | searle   | clip_b32     | 24.78 41.85 17.90 36.99 25.24 46.71 22.64 41.85
        rtd | searle   | clip_b32+rtd | 26.69 44.31 20.72 43.13 26.67 48.75 24.70 45.40
        rtd | lincir   | clip_b32     | 18.55 34.64 15.67 33.86 20.19 40.08 18.14 36.20
        rtd | lincir   | clip_b32+rtd | 23.65 42.74 19.98 41.75 24.73 46.56 22.79 43.68
        rtd | pic2word | clip_l14     | 26.59 42.93 21.32 43.53 28.10 48.19 25.34 44.88
        rtd | pic2word | clip_l14+rtd | 27.97 46.96 23.50 46.65 31.31 53.09 27.59 48.90
        rtd | searle   | clip_l14     | 26.94 45.34 19.58 40.80 28.45 49.77 24.99 45.30
        rtd | searle   | clip_l14+rtd | 32.63 50.39 23.20 47.25 32.18 54.56 29.34 50.73
        rtd | lincir   | clip_l14     | 30.42 47.99 21.86 44.77 29.98 50.38 27.42 47.71
        rtd | lincir   | clip_l14+rtd | 32.83 50.44 24.49 48.24 33.40 54.56 30.24 51.08
        rtd, lincir's table | lincir | clip_bigg | 46.76 65.11 38.08 60.88 50.48 71.09 45.11 65.69
        rtd | lincir   | clip_bigg+rtd | 47.20 66.24 39.86 63.01 51.56 72.51 46.21 67.26
        compodiff, unstated | artemis   | clip_rn50 | 30.70 50.43 33.52 46.54 35.49 47.01 33.24 47.99
        compodiff, unstated | combiner  | clip_rn50 | 32.32 51.65 34.92 48.38 35.65 48.10 34.30 49.38
        compodiff, unstated | compodiff | clip_rn50 | - - - - - - 35.62 48.45
        compodiff, unstated | compodiff | clip_l14 | 37.69 49.08 32.24 46.27 38.12 50.57 36.02 48.64
        compodiff, unstated | compodiff | clip_l14, T5-XL | 38.10 52.48 33.91 47.85 40.07 52.22 37.36 50.85
    """,
    ("fashioniq:bge_vl", "val"): """
        megapairs | image_text | bge_vl_b | 33.7 53.4 26.1 49.3 36.0 57.5 31.9 53.4
        megapairs | image_text | bge_vl_l | 37.0 56.1 29.7 50.3 37.0 59.3 34.6 55.2
    """,
    ("fashioniq:reversed", "val"): """
        pic2word | pic2word | clip_l14 | 26.20 43.60 20.00 40.20 27.90 47.40 24.70 43.70
    """,
    ("cirr", "test1"): """
        searle | image_only | clip_b32 | 6.89 22.99 33.68 59.23 21.04 41.04 60.31
        searle | text_only  | clip_b32 | 21.81 45.22 57.42 81.01 62.24 81.13 90.70
        searle | image_text | clip_b32 | 11.71 35.06 48.94 77.49 32.77 56.89 74.96
        searle | palavra    | clip_b32 | 16.62 43.49 58.51 83.95 41.61 65.30 80.94
        searle | searle_oti | clip_b32 | 24.27 53.25 66.10 88.84 54.10 75.81 87.33
        searle | searle     | clip_b32 | 23.57 52.80 66.48 89.59 54.80 76.70 88.10
        searle | pic2word   | clip_l14 | 23.90 51.70 65.30 87.80 - - -
        searle | searle_oti | clip_l14 | 24.87 52.31 66.29 88.58 53.80 74.31 86.94
        searle | searle     | clip_l14 | 24.22 52.41 66.29 88.63 53.71 74.63 87.61
        compodiff, published weights | searle | clip_l14 | 24.24 52.48 66.29 88.84 53.76 75.01 88.19
        slerp, published weights | lincir | clip_l14 | 25.04 53.25 66.68 - 57.11 77.37 88.89
        slerp | image_only | clip_b32 | 6.99 23.23 34.31 58.89 20.46 40.46 60.87
        slerp | text_only  | clip_b32 | 19.61 43.90 55.42 78.27 62.24 80.99 90.36
        slerp | slerp      | clip_b32 | 24.22 50.94 63.49 84.92 57.86 78.27 89.25
        slerp | slerp      | clip_b32+tat | 28.19 55.88 68.77 88.51 61.13 80.63 90.68
        slerp | image_only | clip_l14 | 7.33 23.01 33.25 56.24 20.84 41.61 61.04
        slerp | text_only  | clip_l14 | 20.92 43.98 55.42 76.77 60.41 79.74 90.36
        slerp | slerp      | clip_l14 | 24.43 49.93 62.29 83.45 57.71 77.59 88.80
        slerp | slerp      | clip_l14+tat | 30.94 59.40 70.94 89.18 64.70 82.92 92.31
        slerp | image_only | blip_l | 7.18 23.30 33.40 57.49 20.92 41.45 60.58
        slerp | text_only  | blip_l | 26.48 51.45 62.10 79.66 66.27 84.53 92.31
        slerp | slerp      | blip_l | 28.60 55.37 65.66 84.05 65.16 83.90 92.05
        slerp | slerp      | blip_l+tat | 33.98 61.74 72.70 88.94 68.55 85.11 93.21
        slerp | slerp      | blip_l, tuned on COCO | 39.08 65.57 75.45 89.83 72.96 88.10 94.87
        slerp | combiner   | clip_b32 supervised | 30.99 61.28 73.69 91.40 59.64 79.95 90.65
        slerp | combiner   | clip_l14 supervised | 30.31 61.11 73.52 90.75 60.84 80.22 90.02
        isa | image_only | blip_b | 7.52 21.83 31.21 52.94 - - -
        isa | text_only  | blip_b | 26.48 50.46 61.22 82.26 - - -
        isa | image_text | blip_b | 8.19 24.19 34.41 57.81 - - -
        isa | pic2word   | blip_b | 26.70 53.16 64.10 84.36 - - -
        isa | searle     | blip_b | 29.27 54.86 66.57 86.16 - - -
        isa | isa | blip_b, EfficientNet-B2 | 30.84 61.06 73.57 92.43 - - -
        isa | isa | blip_b, EfficientViT-M2 | 29.63 58.99 71.37 91.47 - - -
        isa | isa | blip_b, symmetric | 29.68 58.72 70.79 90.33 - - -
        rtd | pic2word | clip_b32     | 13.64 37.45 52.22 - - - -
        rtd | pic2word | clip_b32+rtd | 23.59 51.76 65.16 - - - -
        rtd | searle   | clip_b32     | 23.71 53.30 66.84 - - - -
        rtd | searle   | clip_b32+rtd | 26.29 56.41 69.74 - - - -
        rtd | lincir   | clip_b32     | 18.87 45.66 58.43 - - - -
        rtd | lincir   | clip_b32+rtd | 24.82 53.47 66.87 - - - -
        rtd | pic2word | clip_l14     | 24.22 51.49 64.05 - - - -
        rtd | pic2word | clip_l14+rtd | 27.86 56.24 68.48 - - - -
        rtd | searle   | clip_l14     | 24.89 52.31 65.69 - - - -
        rtd, noise table | searle | clip_l14+rtd | 27.04 56.82 69.95 - - - -
        rtd | lincir   | clip_l14     | 23.76 52.89 66.46 - - - -
        rtd | lincir   | clip_l14+rtd | 26.63 56.17 68.96 - - - -
        rtd, lincir's table | lincir | clip_bigg | 35.25 64.72 76.05 - - - -
        rtd | lincir   | clip_bigg+rtd | 36.31 67.47 78.31 - - - -
        compodiff | artemis   | clip_rn50 | 12.75 33.84 47.75 80.20 21.95 43.88 62.06
        compodiff | combiner  | clip_rn50 | 12.82 36.83 48.19 81.91 24.12 46.47 63.07
        compodiff | compodiff | clip_rn50 | 18.02 - - - 57.16 - -
        compodiff | compodiff | clip_l14 | 18.24 53.14 70.82 90.25 57.42 77.10 87.90
        compodiff | compodiff | clip_l14, T5-XL | 19.37 53.81 72.02 90.85 59.13 78.81 89.33
        compodiff | compodiff | clip_bigg | 26.71 55.14 74.52 92.01 64.54 82.39 91.81
        megapairs, unstated | image_text | bge_vl_b | 36.1 68.1 79.5 94.7 71.6 87.2 94.0
        megapairs, unstated | image_text | bge_vl_l | 38.0 70.3 81.1 94.7 73.2 88.0 94.3
    """,
    ("cirr", "val"): """
        searle | searle_oti | clip_b32 | 23.54 53.93 67.69 90.31 51.26 73.02 86.51
        searle | searle     | clip_b32 | 25.07 55.20 68.52 90.24 54.96 76.51 88.08
        searle | searle_oti | clip_l14 | 24.40 54.68 68.02 89.09 52.27 74.53 86.80
        searle | searle     | clip_l14 | 24.11 53.53 66.78 89.21 53.53 75.58 87.30
        searle | combiner   | clip_b32 supervised | 32.24 65.46 78.21 95.19 - - -
        searle, Table 4: L2 loss | searle_oti | clip_b32 | 17.11 41.90 53.70 - - - -
        searle, Table 7: concept alone | searle_oti | clip_b32 | 21.63 50.51 64.07 88.04 - - -
        searle, Table 7: random concepts | searle_oti | clip_b32 | 21.09 50.42 63.84 87.30 - - -
        searle, Table 7: no regulariser | searle_oti | clip_b32 | 19.30 46.81 59.96 84.74 - - -
        searle, Table 4: cosine distillation | searle | clip_b32 | 23.75 53.19 67.21 - - - -
        searle, Table 4: no distillation | searle | clip_b32 | 22.24 50.06 62.71 - - - -
        searle, Table 7: no regulariser | searle | clip_b32 | 22.41 53.00 66.90 89.95 - - -
        searle, Table 9: on FashionIQ | searle | clip_b32 | 24.04 54.25 67.70 89.28 55.37 77.42 88.64
        searle, Table 9: on CIRR | searle | clip_b32 | 24.34 54.48 67.80 90.62 54.15 76.01 87.63
        searle, Table 9: on FashionIQ | searle | clip_l14 | 24.07 53.34 66.96 87.66 57.02 77.59 88.28
        searle, Table 9: on CIRR | searle | clip_l14 | 24.99 53.51 67.04 89.31 54.50 75.94 87.70
        isa | image_only | clip_l14 | 7.06 25.52 35.64 60.18 - - -
        isa | text_only  | clip_l14 | 21.19 46.14 57.43 78.74 - - -
        isa | image_text | clip_l14 | 10.79 34.37 47.05 75.27 - - -
        isa | pic2word   | clip_l14 | 22.54 51.69 64.76 86.19 - - -
        isa | image_only | blip_b | 6.72 23.13 32.82 55.66 - - -
        isa | text_only  | blip_b | 25.38 51.02 61.76 81.68 - - -
        isa | image_text | blip_b | 7.58 25.90 36.28 61.13 - - -
        isa | pic2word   | blip_b | 27.89 58.15 69.42 87.53 - - -
        isa | searle     | blip_b | 28.03 60.74 71.41 88.82 - - -
        isa | isa | blip_b, EfficientNet-B2 | 31.48 63.42 77.27 93.16 - - -
        isa | isa | blip_b, EfficientViT-M2 | 31.26 62.31 75.70 92.38 - - -
        isa | isa | blip_b, symmetric | 30.21 61.52 74.09 90.81 - - -
        isa | isa | blip_b, EfficientNet-B0 | 32.02 64.57 76.12 92.29 - - -
        isa | isa | blip_b, MobileNetV2 | 30.50 63.51 74.27 91.18 - - -
        isa | isa | blip_b, MobileViTV2 | 27.63 58.66 70.85 88.68 - - -
        rtd | lincir | clip_l14     | - 54.29 67.76 - - - -
        rtd | lincir | clip_l14+rtd | - 57.90 71.13 - - - -
    """,
    ("cirr/inversion", "val"): """
        searle | searle_oti | clip_b32 | 99.81 100 100
        searle | searle     | clip_b32 | 98.94 99.95 100
        searle, Table 7: concept alone | searle_oti | clip_b32 | 99.58 99.90 99.96
        searle, Table 7: random concepts | searle_oti | clip_b32 | 99.03 99.21 99.55
        searle, Table 7: no regulariser | searle_oti | clip_b32 | 99.72 99.91 100
        searle, Table 7: no regulariser | searle | clip_b32 | 99.35 100 100
    """,
    ("circo:bge_vl", "test"): """
        megapairs | image_text | bge_vl_b | 34.3 35.0 37.6 38.7
        megapairs | image_text | bge_vl_l | 39.2 40.2 42.9 44.0
    """,
    ("circo", "test"): """
        searle | image_only | clip_b32 | 1.34 1.60 2.12 2.41
        searle | text_only  | clip_b32 | 2.56 2.67 2.98 3.18
        searle | image_text | clip_b32 | 2.65 3.25 4.14 4.54
        searle | palavra    | clip_b32 | 4.61 5.32 6.33 6.80
        searle | searle_oti | clip_b32 | 7.14 7.83 8.99 9.60
        searle | searle     | clip_b32 | 8.86 9.43 10.55 11.23
        searle | searle_oti | clip_l14 | 10.18 11.03 12.72 13.67
        compodiff, published weights | searle   | clip_l14 | 11.68 12.73 14.33 15.12
        compodiff, published weights | pic2word | clip_l14 | 8.72 9.51 10.64 11.29
        slerp, published weights | lincir | clip_l14 | 12.59 13.58 15.00 15.85
        slerp | image_only | clip_b32 | 1.51 1.86 2.31 2.64
        slerp | text_only  | clip_b32 | 2.50 2.61 2.91 3.09
        slerp | slerp      | clip_b32 | 6.35 7.11 8.12 8.75
        slerp | slerp      | clip_b32+tat | 9.34 10.26 11.65 12.33
        slerp | image_only | clip_l14 | 2.50 3.09 3.93 4.42
        slerp | text_only  | clip_l14 | 3.30 3.65 4.08 4.38
        slerp | slerp      | clip_l14 | 8.76 9.84 11.30 11.99
        slerp | slerp      | clip_l14+tat | 18.46 19.41 21.43 22.41
        slerp, Table 4: LLaVA-Align | slerp | clip_l14+tat | 17.05 18.23 20.11 21.05
        slerp, Table 4: CC3M | slerp | clip_l14+tat | 16.98 17.82 19.62 20.58
        slerp, Table 4: LAION 4M | slerp | clip_l14+tat | 18.45 19.50 21.53 22.52
        slerp, Table 4: LAION 8M | slerp | clip_l14+tat | 18.23 19.21 21.29 22.26
        slerp, Table 4: no anchor | slerp | clip_l14+tat | 8.26 8.90 10.07 10.71
        slerp, Table 4: image anchor | slerp | clip_l14+tat | 7.54 7.73 8.79 9.30
        slerp | image_only | blip_l | 1.52 1.89 2.42 2.77
        slerp | text_only  | blip_l | 4.24 4.59 5.20 5.53
        slerp | slerp      | blip_l | 9.61 10.11 11.10 11.66
        slerp | slerp      | blip_l+tat | 17.84 18.44 20.24 21.07
        isa | image_only | clip_l14 | 1.69 2.18 2.78 3.22
        isa | text_only  | clip_l14 | 2.67 3.00 3.38 3.69
        isa | image_text | clip_l14 | 3.60 4.40 5.59 6.21
        isa | pic2word   | clip_l14 | 8.43 9.11 10.15 10.73
        isa | image_only | blip_b | 1.28 1.48 1.88 2.13
        isa | text_only  | blip_b | 4.01 4.37 4.79 5.13
        isa | image_text | blip_b | 1.39 1.72 2.22 2.51
        isa | pic2word   | blip_b | 8.69 9.36 10.40 10.99
        isa | searle     | blip_b | 10.65 11.34 12.40 13.02
        isa | isa | blip_b, EfficientNet-B2 | 11.33 12.25 13.42 13.97
        isa | isa | blip_b, EfficientViT-M2 | 9.82 10.50 11.61 12.09
        isa | isa | blip_b, symmetric | 9.67 10.32 11.26 11.61
        rtd | pic2word | clip_b32     | 2.85 3.24 3.89 4.31
        rtd | pic2word | clip_b32+rtd | 6.39 6.66 7.64 8.16
        rtd | searle   | clip_b32     | 8.90 9.42 10.64 11.34
        rtd | searle   | clip_b32+rtd | 11.26 12.11 13.63 14.37
        rtd | lincir   | clip_b32     | 6.25 6.74 7.62 8.10
        rtd | lincir   | clip_b32+rtd | 8.94 9.35 10.57 11.21
        rtd | pic2word | clip_l14     | 8.27 9.10 10.09 10.75
        rtd | pic2word | clip_l14+rtd | 9.13 9.63 10.68 11.27
        rtd | searle   | clip_l14     | 11.62 12.72 14.33 15.13
        rtd | searle   | clip_l14+rtd | 16.53 17.89 19.77 20.68
        rtd | lincir   | clip_l14     | 13.00 14.11 15.81 16.68
        rtd | lincir   | clip_l14+rtd | 17.11 18.11 20.06 21.01
        rtd, lincir's table | lincir | clip_bigg | 19.81 21.01 23.03 24.18
        rtd | lincir   | clip_bigg+rtd | 21.08 22.29 24.46 25.44
        compodiff | artemis   | clip_rn50 | 9.35 11.41 13.01 14.13
        compodiff | combiner  | clip_rn50 | 9.77 12.08 13.58 14.11
        compodiff | compodiff | clip_rn50 | 12.01 13.28 15.41 -
        compodiff | compodiff | clip_l14 | 12.55 13.36 15.83 16.43
        compodiff | compodiff | clip_l14, T5-XL | 12.31 13.51 15.67 16.15
        compodiff | compodiff | clip_bigg | 15.33 17.71 19.45 21.01
    """,
    ("circo:magiclens", "test"): """
        magiclens | magiclens | clip_b16 | 23.1 23.8 25.8 26.7
        magiclens | magiclens | clip_l14 | 29.6 30.8 33.4 34.4
        magiclens, released weights | magiclens | clip_b16 | 22.3 23.2 25.0 26.0
        magiclens, released weights | magiclens | clip_l14 | 29.5 30.8 33.2 34.3
    """,
    ("circo", "val"): """
        searle | image_only | clip_b32 | 1.61 2.16 2.73 3.10
        searle | text_only  | clip_b32 | 2.96 3.29 3.74 3.89
        searle | image_text | clip_b32 | 2.63 3.58 4.52 4.94
        searle | palavra    | clip_b32 | 5.15 6.13 7.20 7.78
        searle | searle_oti | clip_b32 | 6.61 7.24 8.30 8.97
        searle | searle     | clip_b32 | 6.37 7.22 8.41 9.10
        searle | searle_oti | clip_l14 | 10.85 12.15 13.63 14.46
        searle | searle     | clip_l14 | 11.02 12.12 13.62 14.43
        isa | image_only | clip_l14 | 1.85 2.24 3.11 3.57
        isa | text_only  | clip_l14 | 2.78 3.06 3.72 3.95
        isa | image_text | clip_l14 | 4.71 5.74 6.88 7.44
        isa | pic2word   | clip_l14 | 7.50 8.31 9.45 10.11
        isa | image_only | blip_b | 1.86 2.18 2.71 2.97
        isa | text_only  | blip_b | 5.32 5.76 6.04 6.29
        isa | image_text | blip_b | 2.04 2.63 3.18 3.49
        isa | pic2word   | blip_b | 7.91 8.27 9.05 9.56
        isa | searle     | blip_b | 11.52 11.74 12.91 13.56
        isa | isa | blip_b, EfficientNet-B2 | 13.19 13.83 15.20 15.85
        isa | isa | blip_b, EfficientViT-M2 | 12.24 12.75 13.80 14.27
        isa | isa | blip_b, symmetric | 11.03 12.01 13.17 13.81
        isa | isa | blip_b, EfficientNet-B0 | 11.11 12.04 13.14 13.67
        isa | isa | blip_b, MobileNetV2 | 10.50 10.82 12.09 12.44
        isa | isa | blip_b, MobileViTV2 | 9.44 9.68 10.49 10.96
        rtd | lincir | clip_l14     | - 12.67 14.45 -
        rtd | lincir | clip_l14+rtd | - 16.10 17.84 -
    """,
    ("genecis", "val"): """
        compodiff | pic2word  | clip_l14 | 15.65 13.87 8.42 6.68 11.16 - -
        compodiff | searle    | clip_l14 | 17.00 16.38 7.96 7.91 12.31 - -
        compodiff | artemis   | clip_rn50 | 11.76 15.41 8.08 18.84 13.52 - -
        compodiff | combiner  | clip_rn50 | 14.11 18.39 8.49 18.72 14.93 - -
        compodiff | compodiff | clip_rn50 | - - - - 14.65 - -
        compodiff | compodiff | clip_l14 | 13.50 19.20 8.11 18.71 14.88 - -
        compodiff | compodiff | clip_l14, T5-XL | 13.01 19.88 8.60 18.94 15.11 - -
        compodiff | compodiff | clip_bigg | 14.32 19.72 9.18 18.71 15.48 - -
        rtd | pic2word | clip_b32     | - - - - 11.13 21.08 31.05
        rtd | pic2word | clip_b32+rtd | - - - - 12.03 21.61 31.09
        rtd | searle   | clip_b32     | - - - - 12.19 22.56 32.03
        rtd | searle   | clip_b32+rtd | - - - - 12.82 22.97 32.44
        rtd | lincir   | clip_b32     | - - - - 12.23 21.29 30.80
        rtd | lincir   | clip_b32+rtd | - - - - 12.83 22.83 32.22
        rtd | pic2word | clip_l14     | - - - - 11.18 21.45 30.55
        rtd | pic2word | clip_l14+rtd | - - - - 11.92 22.32 31.33
        rtd | searle   | clip_l14     | - - - - 12.30 22.08 31.29
        rtd | searle   | clip_l14+rtd | - - - - 12.40 22.82 32.37
        rtd | lincir   | clip_l14     | - - - - 12.45 22.66 32.06
        rtd | lincir   | clip_l14+rtd | - - - - 13.18 23.12 32.77
    """,
    ("coco_object", "val"): """
        rtd | pic2word | clip_b32     | 6.88 13.6 17.52
        rtd | pic2word | clip_b32+rtd | 7.62 20.23 28.69
        rtd | searle   | clip_b32     | 9.52 21.45 29.38
        rtd | searle   | clip_b32+rtd | 11.01 24.34 32.84
        rtd | lincir   | clip_b32     | 7.15 18.38 27.3
        rtd | lincir   | clip_b32+rtd | 9.59 21.66 30.66
        rtd | pic2word | clip_l14     | 10.26 23.67 32.53
        rtd | pic2word | clip_l14+rtd | 10.26 24.66 33.56
        rtd | searle   | clip_l14     | 12.07 26.13 35.17
        rtd | searle   | clip_l14+rtd | 14.38 29.74 38.09
        rtd | lincir   | clip_l14     | 11.37 24.53 33.85
        rtd | lincir   | clip_l14+rtd | 14.6 29.84 38.87
    """,
    ("coco_captions", "test"): """
        compodiff, stage 1, sampling unstated | compodiff | clip_l14 | 35.13 59.46 70.26 35.30 62.62 74.02 16.01 25.44 49.64 22.47 39.18 49.08 22.51 42.40 52.77 21.46 30.30 53.75
        compodiff, stage 1+2, sampling unstated | compodiff | clip_l14 | 33.20 58.00 68.94 34.78 61.68 72.96 15.07 24.39 47.03 20.00 38.63 48.25 21.57 41.71 51.99 20.82 29.84 51.65
    """,
}  # fmt: skip
"""(benchmark, split) -> lines "source | method | backbone | numbers", "-" where none is printed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a paper prints of a method. source: the paper, and what to know of the number."""

    benchmark: str
    split: str
    source: str
    method: str
    backbone: str
    metrics: Mapping[str, float]

    @property
    def paper(self) -> str:
        """Its short name alone."""
        return self.source.partition(",")[0]

    @property
    def variant(self) -> str:
        """What an ablation changes of the method, "" = nothing: it is the paper's own."""
        table, _, changed = self.source.partition(", ")[2].partition(": ")
        return changed if table.startswith("Table ") else ""


def of_paper(paper: str) -> list[Row]:
    """All rows of a paper, of all benchmarks."""
    return [row for key in _TABLES for row in _parse(*key) if row.paper == paper]


def rows(benchmark: str, split: str, methods: Sequence[str], weights_id: str = "") -> list[Row]:
    """Published rows of these methods on the benchmark's split, under exactly this protocol.

    weights_id: of the backbone; if it is one of the papers', only rows on that backbone.
    """
    backbone = backbone_of(weights_id)
    return [
        row
        for row in _parse(benchmark, split)
        if row.method in methods
        and not row.variant
        and (not backbone or _base(row.backbone) == backbone)
    ]


BACKBONES = {
    "clip-vit-base-patch32": "clip_b32",
    "vit-b-32": "clip_b32",
    "clip-vit-base-patch16": "clip_b16",
    "vit-b-16": "clip_b16",
    "clip-vit-large-patch14": "clip_l14",
    "vit-l-14": "clip_l14",
    "vit-bigg-14": "clip_bigg",
    "rn50.": "clip_rn50",
    "bge-vl-base": "bge_vl_b",
    "bge-vl-large": "bge_vl_l",
    "model_large": "blip_l",
    "model_base": "blip_b",
}
"""Part of a weights id, in lower case -> backbone."""


def backbone_of(weights_id: str) -> str:
    """The papers' backbone with these weights, "" for any other."""
    found = [name for part, name in BACKBONES.items() if part in weights_id.lower()]
    return found[0] if found else ""


def _base(backbone: str) -> str:
    return backbone.partition("+")[0].partition(",")[0].partition(" ")[0]


def _parse(benchmark: str, split: str) -> Iterator[Row]:
    names = METRICS.get(benchmark.partition(":")[0], ())
    for line in _TABLES.get((benchmark, split), "").strip().splitlines():
        source, method, backbone, numbers = (part.strip() for part in line.split("|"))
        values = zip(names, numbers.split(), strict=True)
        metrics = {name: float(value) for name, value in values if value != "-"}
        yield Row(benchmark, split, source, method, backbone, metrics)
