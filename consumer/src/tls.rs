//! HTTPS of the requests we send: whom we trust.

use std::sync::{Arc, LazyLock};

use rustls::crypto::ring::default_provider;
use rustls_native_certs::{CertificateResult, load_native_certs};
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// The certificates of this machine, or what `SSL_CERT_FILE` and `SSL_CERT_DIR` name; read once.
static FOUND: LazyLock<CertificateResult> = LazyLock::new(load_native_certs);

/// What every client of ours needs, whatever its URL: without it the library panics at an https that a redirect or a
/// proxy leads to.
pub(crate) fn config() -> TlsConfig {
    let trusted = FOUND.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned());
    TlsConfig::builder()
        .root_certs(RootCerts::from(trusted))
        .unversioned_rustls_crypto_provider(Arc::new(default_provider()))
        .build()
}

/// Why nobody is trusted, where that is so.
pub(crate) fn trusts_nobody() -> Option<String> {
    let why = || FOUND.errors.first().map_or_else(|| "there is none".to_owned(), ToString::to_string);
    FOUND.certs.is_empty().then(why)
}
