import java.nio.file.Path;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import org.elasticsearch.common.settings.Settings;
import org.elasticsearch.index.mapper.MapperExtrasPlugin;
import org.elasticsearch.node.InternalSettingsPreparer;
import org.elasticsearch.node.Node;
import org.elasticsearch.transport.Netty4Plugin;

/** One node out of the published jars, for where the whole distribution is not to be had. Arguments: key=value. */
public final class OneNode extends Node {
    private OneNode(Settings settings, Path config) {
        // Plugins of the class path instead of a plugins folder; 'true' loads no others.
        super(
            InternalSettingsPreparer.prepareEnvironment(settings, Map.of(), config, () -> "one"),
            List.of(Netty4Plugin.class, MapperExtrasPlugin.class),
            true);
    }

    public static void main(String[] arguments) throws Exception {
        Settings.Builder settings = Settings.builder();
        for (String argument : arguments) {
            settings.put(argument.substring(0, argument.indexOf('=')), argument.substring(argument.indexOf('=') + 1));
        }
        Settings given = settings.build();
        new OneNode(given, Path.of(given.get("path.home"))).start();
        new CountDownLatch(1).await();
    }
}
