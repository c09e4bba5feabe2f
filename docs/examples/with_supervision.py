"""Draws what student.onnx finds in street.jpg, with onnxruntime and supervision."""

import ast

import numpy as np
import onnxruntime
import supervision
from PIL import Image

session = onnxruntime.InferenceSession("student.onnx")
names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
image = Image.open("street.jpg").convert("RGB")
pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"image": pixels})
found = supervision.Detections(xyxy=boxes, confidence=scores, class_id=labels.astype(int) - 1)
found = found[found.confidence > 0.5]
image = supervision.BoxAnnotator().annotate(image, found)
image = supervision.LabelAnnotator().annotate(image, found, [names[k] for k in found.class_id])
image.save("drawn.png")
