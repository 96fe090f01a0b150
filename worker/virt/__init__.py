"""The noun libvirt: hosts, guests and their definitions. The only package that imports libvirt and lxml."""
