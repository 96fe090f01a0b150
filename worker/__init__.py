"""The machinery: engine, verbs, the nouns libvirt and disk images, and the `virtfleet` command."""
