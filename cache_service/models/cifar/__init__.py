"""The 32 x 32 networks of the CIFAR distillation literature, registered with timm."""
