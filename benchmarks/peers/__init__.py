"""Other libraries that steer, each driven through its public API by an adapter of a few lines.

``registry`` lists them, ``correctness`` says whether they do what was asked, ``absent`` who could not be run and why;
``benchmarks/test_peers.py`` times them.
"""
