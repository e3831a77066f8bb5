// Java's own HTTP server, by the book: `java Served.java PORT`.
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.Executors;

public class Served {
    public static void main(String[] arguments) throws Exception {
        String identity = "gen=" + System.getenv("HANDOVER_GENERATION") + " pid=" + ProcessHandle.current().pid();
        HttpServer server = HttpServer.create(new InetSocketAddress(Integer.parseInt(arguments[0])), 0);
        server.createContext("/", exchange -> {
            exchange.sendResponseHeaders(200, identity.length());
            exchange.getResponseBody().write(identity.getBytes());
            exchange.close();
        });
        server.setExecutor(Executors.newFixedThreadPool(8));
        Runtime.getRuntime().addShutdownHook(new Thread(() -> server.stop(1)));
        server.start();
    }
}
