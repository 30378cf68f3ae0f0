//! Sessions in a WebSocket.

use futures::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex, split},
    net::TcpStream,
};
use tokio_postgres::{Client, NoTls, config::SslMode};
use tokio_tungstenite::{
    client_async,
    tungstenite::{Message, client::IntoClientRequest},
};

use super::World;

impl World {
    /// A session of `alice` with a password, and with a token where one is given. Errors are what the proxy says. For a proxy
    /// with `--allow-cleartext`.
    pub async fn in_websocket(&self, host: &str, token: Option<&str>, password: &str) -> Result<Client, String> {
        let mut request = format!("ws://{host}/v2").into_client_request().expect("a request");
        if let Some(token) = token {
            request.headers_mut().insert("Authorization", format!("Bearer {token}").parse().expect("a header"));
        }
        let tcp = TcpStream::connect(self.http_address).await.expect("connected");
        let (socket, _) = client_async(request, tcp).await.map_err(|error| error.to_string())?;
        let (mut sink, mut stream) = socket.split();
        let (near, far) = duplex(64 * 1024);
        let (mut from_client, mut to_client) = split(far);
        tokio::spawn(async move {
            let mut buffer = vec![0; 8192];
            while let Ok(bytes @ 1..) = from_client.read(&mut buffer).await {
                if sink.send(Message::binary(buffer[..bytes].to_vec())).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Some(Ok(message)) = stream.next().await {
                if to_client.write_all(&message.into_data()).await.is_err() {
                    return;
                }
            }
        });
        let mut config = tokio_postgres::Config::new();
        config.user("alice").password(password).dbname("postgres").ssl_mode(SslMode::Disable);
        let (client, connection) = config.connect_raw(near, NoTls).await.map_err(super::said)?;
        tokio::spawn(connection);
        Ok(client)
    }
}
