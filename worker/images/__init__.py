"""The noun disk images: qemu-img, the image cache, transfers, seeds, and the files of instances."""
