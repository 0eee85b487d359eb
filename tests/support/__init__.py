"""Parts that tests share: servers, fakes, small jobs, and reads of outputs."""
