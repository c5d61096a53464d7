//! Startup and authentication
//! (<https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP>).

use std::time::Duration;

use postgres_protocol::{
    authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    message::frontend,
};

use super::{
    connection::server_error,
    conninfo::{ConnInfo, Host, SslMode},
    transport::Transport,
    wire::Wire,
};
use crate::error::{Error, Kind};

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// SQL.
    Sql,
    /// Streaming from a logical slot.
    Replication,
}

/// Connects to one host and authenticates; the server is ready for a query afterwards.
pub(super) fn connect(
    info: &ConnInfo,
    host: &Host,
    purpose: Purpose,
    timeout: Duration,
) -> Result<Wire, Error> {
    if info.ssl_mode >= SslMode::Require {
        return Err(Error::new(
            Kind::Misconfigured,
            "sslmode require, verify-ca and verify-full are not supported yet",
        )
        .hint("use sslmode=prefer or disable on a trusted network, such as loopback or a Unix socket"));
    }
    let io = |e: std::io::Error| Error::postgres_io(&format!("cannot connect to Postgres at {host}"), &e);
    let mut wire = Wire::new(Transport::connect(host, timeout).map_err(io)?);
    wire.set_timeout(timeout).map_err(io)?;
    let mut parameters = vec![
        ("user", info.user.as_str()),
        ("database", info.database.as_str()),
        ("application_name", "cdc-relay"),
        ("client_encoding", "UTF8"),
    ];
    if purpose == Purpose::Replication {
        // The text forms that the outbox is read in must not depend on the role's or the database's settings.
        parameters.extend([
            ("replication", "database"),
            ("bytea_output", "hex"),
            ("DateStyle", "ISO"),
            ("TimeZone", "UTC"),
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

/// Sends what is to be sent and waits for the next message.
fn receive(wire: &mut Wire, host: &Host) -> Result<(u8, Vec<u8>), Error> {
    let io = |e: std::io::Error| {
        Error::postgres_io(&format!("the start of the session with Postgres at {host} failed"), &e)
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
            auth::SASL => {
                if info.password.is_empty() {
                    return Err(refused(format!(
                        "Postgres at {host} asks for a password of role {:?} and none is configured",
                        info.user
                    ))
                    .hint("set postgres.password, or CDC_RELAY_POSTGRES__PASSWORD(_FILE)"));
                }
                if !data.split(|b| *b == 0).any(|m| m == SCRAM_SHA_256.as_bytes()) {
                    return Err(refused("the server offers no SCRAM-SHA-256".into()));
                }
                let client =
                    ScramSha256::new(info.password.expose().as_bytes(), ChannelBinding::unsupported());
                frontend::sasl_initial_response(SCRAM_SHA_256, client.message(), &mut wire.out)
                    .map_err(|e| Error::postgres_io("SCRAM failed", &e))?;
                scram = Some(client);
            }
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

fn unexpected(tag: u8) -> Error {
    Error::new(
        Kind::PostgresAway,
        format!(
            "unexpected message {:?} while starting a session: is this a Postgres server?",
            char::from(tag)
        ),
    )
}
