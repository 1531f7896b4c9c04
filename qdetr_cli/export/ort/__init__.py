"""The pass for ONNX Runtime: a graph with quantizers in the form that its integer kernels take.

`prepared` gives standard ONNX (no operators of ONNX Runtime's own), so other runtimes read the file too, but
each pattern is one that ONNX Runtime's optimizer is known to turn into integer kernels; tests hold that.
Values are those of the graph that is given, but for biases of convolutions, which are rounded to int32.
"""
