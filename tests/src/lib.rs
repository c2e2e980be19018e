//! Nothing lives here: the tests are the `it` and `tidy` binaries of this package.
