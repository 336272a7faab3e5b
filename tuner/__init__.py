# SPDX-License-Identifier: Apache-2.0
"""The command line of jaxwin; installed as `jaxwin.tuner`, never imported by `import jaxwin`."""
