//! Why a broker's certificate is not trusted: librdkafka only says that it is not, so we look at it ourselves. Only
//! for the message; nothing is decided by it.

use std::{
    io::{Error as IoError, Read as _},
    net::{TcpStream, ToSocketAddrs as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustls::{
    ClientConfig, ClientConnection, Error as TlsError, RootCertStore, StreamOwned,
    crypto::ring as provider,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

use crate::config::KafkaConfig;

/// For each step of one handshake.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What is wrong with the certificate of the broker that librdkafka's message names
/// (`ssl://HOST:PORT/ID: …`); None where that cannot be told.
pub(super) fn why_not(config: &KafkaConfig, message: &str) -> Option<String> {
    let (_, rest) = message.split_once("://")?;
    let (host, port) = rest.split('/').next()?.rsplit_once(':')?;
    let host = host.trim_matches(['[', ']']);
    let provider = Arc::new(provider::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    let tls = builder.with_root_certificates(roots(config)?).with_no_client_auth();
    let name = ServerName::try_from(host.to_owned()).ok()?;
    let tls = ClientConnection::new(Arc::new(tls), name).ok()?;
    let mut addresses = (host, port.parse().ok()?).to_socket_addrs().ok()?;
    let socket = addresses.find_map(|address| TcpStream::connect_timeout(&address, TIMEOUT).ok())?;
    socket.set_read_timeout(Some(TIMEOUT)).ok()?;
    socket.set_write_timeout(Some(TIMEOUT)).ok()?;
    let failure = StreamOwned::new(tls, socket).read(&mut [0]).err()?;
    certificate_error(&failure)
}

fn certificate_error(failure: &IoError) -> Option<String> {
    match failure.get_ref()?.downcast_ref()? {
        TlsError::InvalidCertificate(error) => Some(error.to_string()),
        _ => None,
    }
}

/// What librdkafka trusts by our configuration.
fn roots(config: &KafkaConfig) -> Option<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let given = |name: &str| config.properties.get(name).map(service::Secret::expose);
    let certificates = match (given("ssl.ca.pem"), given("ssl.ca.location")) {
        (Some(pem), _) => {
            CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>().ok()?
        }
        (None, Some(path)) if path != "probe" => {
            CertificateDer::pem_file_iter(Path::new(path)).ok()?.collect::<Result<Vec<_>, _>>().ok()?
        }
        _ => rustls_native_certs::load_native_certs().certs,
    };
    roots.add_parsable_certificates(certificates);
    (!roots.is_empty()).then_some(roots)
}
