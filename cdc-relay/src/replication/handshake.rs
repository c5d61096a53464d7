//! Startup and authentication
//! (<https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP>).

use std::{
    io::{Read as _, Write as _},
    time::Duration,
};

use bytes::BytesMut;
use postgres_protocol::{
    authentication::sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256},
    message::frontend,
};

use super::{
    conninfo::{ConnInfo, Host, SslMode},
    place::Place,
    server_error::server_error,
    tls,
    transport::Transport,
    wire::Wire,
};
use crate::{
    error::{Error, Kind},
    shared::instance,
};

/// What `pg_stat_activity` and `pg_stat_replication` call us begins with this; then come `/HOST/PID`.
pub(crate) const APPLICATION_NAME: &str = "cdc-relay";
/// Postgres' limit on it, in bytes (`NAMEDATALEN` - 1); it would cut off the process id.
const APPLICATION_NAME_MAX_BYTES: usize = 63;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// SQL.
    Sql,
    /// Streaming from a logical slot.
    Replication,
}

/// Connects to one place and authenticates; the server is ready for a query afterwards.
pub(super) fn connect(
    info: &ConnInfo,
    place: &Place,
    purpose: Purpose,
    timeout: Duration,
) -> Result<Wire, Error> {
    let host = &place.host;
    let io = |e: std::io::Error| Error::postgres_io(&format!("cannot connect to Postgres at {place}"), &e);
    let transport = Transport::connect(place, timeout).map_err(io)?;
    transport.set_timeout(timeout).map_err(io)?;
    let mut wire = Wire::new(secure(transport, info, host)?);
    let name = application_name(&instance());
    let mut parameters = vec![
        ("user", info.user.as_str()),
        ("database", info.database.as_str()),
        ("application_name", &name),
        ("client_encoding", "UTF8"),
    ];
    if purpose == Purpose::Replication {
        // The text forms that the outbox is read in must not depend on the role's or the database's settings.
        parameters.extend([
            ("replication", "database"),
            ("bytea_output", "hex"),
            ("DateStyle", "ISO"),
            ("IntervalStyle", "postgres"),
            ("TimeZone", "UTC"),
            // Floating-point numbers in as many digits as tell them apart.
            ("extra_float_digits", "3"),
        ]);
    }
    frontend::startup_message(parameters, &mut wire.out).map_err(io)?;
    authenticate(&mut wire, info, host)?;
    loop {
        let (tag, body) = receive(&mut wire, host)?;
        match tag {
            b'Z' => return Ok(wire),
            b'E' => return Err(server_error(&body)),
            // Parameters, the cancellation key and notices.
            b'S' | b'K' | b'N' | b'v' => {}
            other => return Err(unexpected(other)),
        }
    }
}

/// Of a long instance the end: the names of containers differ there.
fn application_name(instance: &str) -> String {
    let room = APPLICATION_NAME_MAX_BYTES - APPLICATION_NAME.len() - 1;
    let mut start = instance.len().saturating_sub(room);
    while !instance.is_char_boundary(start) {
        start += 1;
    }
    format!("{APPLICATION_NAME}/{}", &instance[start..])
}

/// Asks for TLS where `sslmode` wants it
/// (<https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL>).
fn secure(mut transport: Transport, info: &ConnInfo, host: &Host) -> Result<Transport, Error> {
    let (Host::Tcp { name, .. }, true) = (host, info.ssl_mode > SslMode::Disable) else {
        return Ok(transport);
    };
    let io = |e: std::io::Error| Error::postgres_io(&format!("cannot connect to Postgres at {host}"), &e);
    let (mut request, mut answer) = (BytesMut::new(), [0]);
    frontend::ssl_request(&mut request);
    transport.write_all(&request).map_err(io)?;
    // One byte and no more: what came with it could be an attacker's, sent before there was a key.
    transport.read_exact(&mut answer).map_err(io)?;
    match answer[0] {
        b'S' => transport.encrypt(tls::client(info, name)?).map_err(|e| match e.kind() {
            // What rustls has against the server, its certificate above all.
            std::io::ErrorKind::InvalidData => {
                Error::new(Kind::Refused, format!("TLS with Postgres at {host} failed: {e}"))
                    .hint("check sslmode and sslrootcert in postgres.url against the server's certificate")
            }
            _ => io(e),
        }),
        _ if info.ssl_mode == SslMode::Prefer => Ok(transport),
        _ => Err(Error::new(
            Kind::Refused,
            format!("Postgres at {host} does not offer TLS, and sslmode demands it"),
        )
        .hint("set ssl = on, ssl_cert_file and ssl_key_file on the server; on a network that is trusted, sslmode=prefer goes without")),
    }
}

/// Sends what is to be sent and waits for the next message.
fn receive(wire: &mut Wire, host: &Host) -> Result<(u8, Vec<u8>), Error> {
    let io = |e: std::io::Error| {
        let what = format!("the start of the session with Postgres at {host} failed");
        // With TLS 1.3 the server looks at our certificate only after the handshake has ended on our side.
        match e.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(rustls::Error::AlertReceived(alert)) => {
                Error::new(Kind::Refused, format!("{what}: the server's TLS says {alert:?}")).hint(
                    "check sslcert and sslkey in postgres.url: who signed the certificate (ssl_ca_file on the server) and its dates",
                )
            }
            _ => Error::postgres_io(&what, &e),
        }
    };
    wire.flush().map_err(io)?;
    loop {
        if let Some((tag, body)) = wire.next_frame().map_err(io)? {
            return Ok((tag, body.to_vec()));
        }
        if wire.fill().map_err(io)? == super::wire::Fill::Empty {
            // The socket blocks, so this is its timeout.
            return Err(io(std::io::ErrorKind::TimedOut.into()));
        }
    }
}

/// The number after an authentication message's tag says which it is.
mod auth {
    pub(super) const OK: i32 = 0;
    pub(super) const CLEARTEXT: i32 = 3;
    pub(super) const MD5: i32 = 5;
    pub(super) const SASL: i32 = 10;
    pub(super) const SASL_CONTINUE: i32 = 11;
    pub(super) const SASL_FINAL: i32 = 12;
}

fn authenticate(wire: &mut Wire, info: &ConnInfo, host: &Host) -> Result<(), Error> {
    let refused = |what: String| Error::new(Kind::Refused, what);
    let mut scram: Option<ScramSha256> = None;
    loop {
        let (tag, body) = receive(wire, host)?;
        if tag == b'E' {
            return Err(server_error(&body));
        }
        let (code, data) = match body.split_first_chunk() {
            Some((code, data)) if tag == b'R' => (i32::from_be_bytes(*code), data),
            _ if tag == b'N' || tag == b'v' => continue,
            _ => return Err(unexpected(tag)),
        };
        match code {
            auth::OK => {
                return if scram.is_some() {
                    Err(refused("the server ended SCRAM without proving that it knows the password".into()))
                } else {
                    Ok(())
                };
            }
            auth::SASL => scram = Some(begin_scram(wire, info, host, data)?),
            auth::SASL_CONTINUE => {
                let client = scram.as_mut().ok_or_else(|| unexpected(tag))?;
                client.update(data).map_err(|e| refused(format!("SCRAM failed: {e}")))?;
                frontend::sasl_response(client.message(), &mut wire.out)
                    .map_err(|e| Error::postgres_io("SCRAM failed", &e))?;
            }
            auth::SASL_FINAL => {
                let mut client = scram.take().ok_or_else(|| unexpected(tag))?;
                client
                    .finish(data)
                    .map_err(|e| refused(format!("the server's proof in SCRAM is wrong: {e}")))?;
            }
            auth::CLEARTEXT | auth::MD5 => {
                return Err(refused(format!("Postgres at {host} asks for the password in clear text or as md5, which is not sent"))
                    .hint("use scram-sha-256 in pg_hba.conf, and set the role's password again under password_encryption = scram-sha-256"));
            }
            other => {
                return Err(refused(format!(
                    "the server asks for authentication method {other}, which is not supported"
                ))
                .hint("use scram-sha-256 in pg_hba.conf"));
            }
        }
    }
}

/// Starts SCRAM, bound to the TLS channel where both sides can
/// (<https://www.postgresql.org/docs/current/sasl-authentication.html>).
fn begin_scram(
    wire: &mut Wire,
    info: &ConnInfo,
    host: &Host,
    mechanisms: &[u8],
) -> Result<ScramSha256, Error> {
    if info.password.is_empty() {
        let what =
            format!("Postgres at {host} asks for a password of role {:?} and none is configured", info.user);
        return Err(Error::new(Kind::Refused, what)
            .hint("set postgres.password, or CDC_RELAY_POSTGRES__PASSWORD(_FILE)"));
    }
    let offers = |mechanism: &str| mechanisms.split(|b| *b == 0).any(|m| m == mechanism.as_bytes());
    if !offers(SCRAM_SHA_256) {
        return Err(Error::new(Kind::Refused, format!("Postgres at {host} offers no SCRAM-SHA-256")));
    }
    let (mechanism, binding) = match wire.transport().tls().and_then(tls::server_end_point) {
        None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        Some(data) if offers(SCRAM_SHA_256_PLUS) => {
            (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(data))
        }
        // "We could, you cannot": a server that can takes this as the sign of a man in the middle.
        Some(_) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
    };
    let client = ScramSha256::new(info.password.expose().as_bytes(), binding);
    frontend::sasl_initial_response(mechanism, client.message(), &mut wire.out)
        .map_err(|e| Error::postgres_io("SCRAM failed", &e))?;
    Ok(client)
}

fn unexpected(tag: u8) -> Error {
    Error::new(
        Kind::PostgresAway,
        format!(
            "unexpected message {:?} while starting a session: is this a Postgres server?",
            char::from(tag)
        ),
    )
}
