"""Where answers come from: every foreign system behind a port of `pjv2.ports`, one file (or folder) each.

All input and output lives here. A backend may import `pjv2.ports` and what stands left of it, never the driver, the poller or the
command line; the configuration chooses one by name, so importing `pjv2` imports none of them.

Law: foreign exceptions are translated at this border, and a backend never decides.
"""
