//! TLS to Postgres: what libpq means by `sslmode`, and the channel binding that SCRAM takes from it
//! (<https://www.postgresql.org/docs/current/libpq-ssl.html>).

use std::sync::Arc;

use ring::digest;
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error as TlsError,
    RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring as provider},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};

use super::conninfo::{ConnInfo, SslMode};
use crate::error::{Error, Kind};

/// A TLS client for one connection to `host`, checking of the server's certificate what `sslmode` asks for.
///
/// # Errors
/// Misconfigured: a certificate file that cannot be read, or nothing to check the server's certificate against.
pub(super) fn client(info: &ConnInfo, host: &str) -> Result<ClientConnection, Error> {
    let bad = |what: String| Error::new(Kind::Misconfigured, what);
    let provider = Arc::new(provider::default_provider());
    let builder =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|e| bad(format!("TLS cannot be set up: {e}")))?;
    // As with libpq, a root certificate that is named is also used where the mode alone would not ask for it.
    let check = match info.ssl_mode {
        SslMode::VerifyFull => Check::Full,
        SslMode::VerifyCa => Check::Chain,
        SslMode::Require if info.ssl_root_cert.is_some() => Check::Chain,
        _ => Check::Nothing,
    };
    let chain = match check {
        Check::Nothing => None,
        Check::Chain | Check::Full => {
            let verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots(info)?), Arc::clone(&provider));
            Some(verifier.build().map_err(|e| bad(format!("the root certificates cannot be used: {e}")))?)
        }
    };
    let verifier = Arc::new(Verifier { chain, name: check == Check::Full, provider });
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let config = match (&info.ssl_cert, &info.ssl_key) {
        (None, None) => builder.with_no_client_auth(),
        (Some(cert), Some(key)) => {
            let read = |path: &std::path::Path, e| bad(format!("cannot read {}: {e}", path.display()));
            let certs = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
            let certs = certs.map_err(|e| read(cert, e))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|e| read(key, e))?;
            builder
                .with_client_auth_cert(certs, key)
                .map_err(|e| bad(format!("sslcert and sslkey cannot be used: {e}")))?
        }
        _ => return Err(bad("sslcert and sslkey go together in postgres.url".into())),
    };
    let name = ServerName::try_from(host.to_owned())
        .map_err(|e| bad(format!("the host {host:?} is no name for TLS: {e}")))?;
    ClientConnection::new(Arc::new(config), name).map_err(|e| bad(format!("TLS cannot be set up: {e}")))
}

/// A TLS client that takes whatever certificate it is shown: to look at it, and for nothing else.
///
/// # Errors
/// Misconfigured: the host is no name.
pub(crate) fn onlooker(host: &str) -> Result<ClientConnection, Error> {
    let bad = |what: String| Error::new(Kind::Misconfigured, what);
    let provider = Arc::new(provider::default_provider());
    let builder =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|e| bad(format!("TLS cannot be set up: {e}")))?;
    let verifier = Arc::new(Verifier { chain: None, name: false, provider });
    let config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    let name = ServerName::try_from(host.to_owned())
        .map_err(|e| bad(format!("the host {host:?} is no name for TLS: {e}")))?;
    ClientConnection::new(Arc::new(config), name).map_err(|e| bad(format!("TLS cannot be set up: {e}")))
}

/// The certificate that the server has shown, in DER form.
pub(crate) fn shown(connection: &ClientConnection) -> Option<Vec<u8>> {
    connection.peer_certificates()?.first().map(|der| der.to_vec())
}

fn roots(info: &ConnInfo) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    match &info.ssl_root_cert {
        Some(path) if path.as_os_str() != "system" => {
            let bad = |e| {
                Error::new(Kind::Misconfigured, format!("cannot read sslrootcert {}: {e}", path.display()))
            };
            for cert in CertificateDer::pem_file_iter(path).map_err(bad)? {
                let unusable =
                    |e| Error::new(Kind::Misconfigured, format!("sslrootcert {}: {e}", path.display()));
                roots.add(cert.map_err(bad)?).map_err(unusable)?;
            }
        }
        _ => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err(Error::new(
            Kind::Misconfigured,
            "there is no root certificate to check the server's against",
        )
        .hint("name a file in PEM form: sslrootcert=… in postgres.url"));
    }
    Ok(roots)
}

/// What is checked of the server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    Nothing,
    Chain,
    Full,
}

#[derive(Debug)]
struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// Whether the certificate must be for the host's name.
    name: bool,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(cert, intermediates, server_name, ocsp, now) {
            // The name is looked at last, so everything else was right.
            Err(TlsError::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.name => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The data of the channel binding `tls-server-end-point` (RFC 5929): the certificate's hash, by the hash of its
/// own signature, or SHA-256 where that is MD5 or SHA-1. None for a signature that names no hash of ours.
pub(super) fn server_end_point(connection: &ClientConnection) -> Option<Vec<u8>> {
    let cert = connection.peer_certificates()?.first()?;
    let algorithm = signature_hash(cert)?;
    Some(digest::digest(algorithm, cert).as_ref().to_vec())
}

fn signature_hash(cert: &[u8]) -> Option<&'static digest::Algorithm> {
    // Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OID, … }, … } (RFC 5280)
    let (_, certificate, _) = der(cert)?;
    let (_, _, after_tbs) = der(certificate)?;
    let (_, algorithm, _) = der(after_tbs)?;
    let (_, oid, _) = der(algorithm)?;
    match oid {
        // 1.2.840.113549.1.1.n: RSA with MD5, SHA-1, SHA-256, SHA-384, SHA-512
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, n] => match n {
            4 | 5 | 11 => Some(&digest::SHA256),
            12 => Some(&digest::SHA384),
            13 => Some(&digest::SHA512),
            _ => None,
        },
        // 1.2.840.10045.4.3.n: ECDSA with SHA-256, SHA-384, SHA-512; 4.1 is with SHA-1
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, n] => match n {
            2 => Some(&digest::SHA256),
            3 => Some(&digest::SHA384),
            4 => Some(&digest::SHA512),
            _ => None,
        },
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01] => Some(&digest::SHA256),
        _ => None,
    }
}

/// A DER element: its tag, its content, and what follows it.
fn der(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = bytes.split_first_chunk()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        if digits.len() > 4 {
            return None;
        }
        (digits.iter().fold(0, |n, d| n << 8 | usize::from(*d)), rest)
    };
    let (content, after) = rest.split_at_checked(length)?;
    Some((tag, content, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn der_is_read_within_its_bounds() {
        assert_eq!(der(&[0x30, 2, 1, 2, 9]), Some((0x30, &[1, 2][..], &[9][..])));
        assert_eq!(der(&[0x30, 0x81, 1, 7]), Some((0x30, &[7][..], &[][..])));
        for bad in [
            &[][..],
            &[0x30],
            &[0x30, 1],
            &[0x30, 0x81],
            &[0x30, 0x85, 0, 0, 0, 0, 0],
            &[0x30, 0x84, 255, 255, 255, 255],
        ] {
            assert_eq!(der(bad), None);
            assert!(signature_hash(bad).is_none());
        }
    }
}
