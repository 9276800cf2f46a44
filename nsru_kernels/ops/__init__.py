"""The ops, one folder each: public function, definition, kernels, autograd.

Dimensions, everywhere in the package:

    M  tokens            K  in_features          N  out_features
    R  LoRA rank         Q  retain-subspace rank L  sketch width (Q plus oversampling)
"""
