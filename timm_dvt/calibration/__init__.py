"""A denoiser without training: views of images, position's part in them, the mean artifact map."""
