"""Which of our modules stands behind which foreign address: data, in one file per subject.

An address is written without its family: `utils.types` is `slime.utils.types`, and so on for every
family of the row. Where a foreign module has names out of several of ours, a module below
`dovetail.compat.modules` collects them and is the foreign module. Nothing here is imported before
somebody imports its address.
"""
